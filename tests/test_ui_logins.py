"""Two logins in two browsers at the same time: neither sees anything of the other's."""

import contextlib
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_ui_compare import choose

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app.web_server import WebServer
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.access import Access

pytestmark = pytest.mark.browser

LONG = " ".join(f"half-written{at}" for at in range(3000))
SECRETS = (
    "bank-account", "half-written", "typed-and-not-sent", "my-own-rules", "diary-entry", "compared-in-secret",
    "It is red.",
)  # fmt: skip
RED, BLUE = "red-model", "blue-model"


@pytest.fixture
def place(tmp_path):
    library, settings = FakeLibrary(tmp_path), Settings(tmp_path / "settings.json")
    library._models += [replace(library.get(MISTRAL), folder=tmp_path / name) for name in (RED, BLUE)]
    for name, answer in ((RED, "It is red."), (BLUE, "It is blue.")):
        settings.save_for_model(name, options={"answer": answer})
    engine = Engine(library, settings, [FakeLoader()])
    engine.load(MISTRAL, options={"answer": LONG, "tokens_per_s": 10.0})
    chats = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    page = ui_page.build(engine, Downloads(engine.library), access=Access(frozenset({"anna", "boss"})), chats=chats)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(ui_page.application(page, [("anna", "a"), ("guest", "g"), ("boss", "b")]), "127.0.0.1", port)
    web.start()
    yield SimpleNamespace(chats=chats, store=chats.store, url=f"http://127.0.0.1:{port}")
    chats.close()
    web.stop()
    engine.unload()


def enter(browser, place, name, password):
    """A browser of its own, logged in, with the page open, and the sessions that it has."""
    context = browser.new_context()
    assert context.request.post(f"{place.url}/login", form={"username": name, "password": password}).ok
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    sessions = set()
    tab.on(
        "request", lambda asked: sessions.add(asked.url.partition("session_hash=")[2]) if "session_hash=" in asked.url else None
    )
    tab.goto(place.url)
    tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
    return tab, sessions


def note(tab, text):
    """Into the notebook, which the server may fill at this very moment."""
    tab.wait_for_selector("#gw-notebook-text textarea:visible")
    for _again in range(10):
        tab.fill("#gw-notebook-text textarea", "")
        tab.locator("#gw-notebook-text textarea").press_sequentially(text)
        with contextlib.suppress(Exception):
            tab.wait_for_selector("#gw-notebook-line:has-text('tokens')", timeout=3000)
            return
    raise AssertionError("the notebook did not take the text")


def secrets_in(tab, *but):
    """What the page of another login knows, in its elements and its boxes."""
    shown = tab.evaluate("document.documentElement.innerHTML + [...document.querySelectorAll('textarea')].map(e => e.value)")
    return [each for each in SECRETS if each in shown and each not in but]


def test_two_logins_see_nothing_of_each_other(place):
    with chromium() as browser:
        anna, sessions = enter(browser, place, "anna", "a")
        anna.get_by_role("button", name="Conversation settings").click()
        anna.fill("#gw-system textarea", "my-own-rules")
        anna.fill("#gw-message textarea", "bank-account")
        anna.press("#gw-message textarea", "Enter")
        anna.wait_for_selector("#gw-live:has-text('half-written3')")
        anna.fill("#gw-message textarea", "typed-and-not-sent")
        (info,) = place.store.listed("anna")
        end = time.monotonic() + 45
        while place.store.get("anna", info.id).draft != "typed-and-not-sent":
            assert time.monotonic() < end
            time.sleep(0.05)
        anna.get_by_role("tab", name="Notebook").click()
        note(anna, "diary-entry")
        guest, _own = enter(browser, place, "guest", "g")
        guest.evaluate("id => window.gwChat.act('open', id)", info.id)
        guest.wait_for_selector("#gw-line:has-text('no longer there')")
        guest.evaluate("id => sessionStorage.setItem('gptq-webui chat', id)", info.id)
        guest.reload()
        guest.wait_for_function("document.querySelector('#gw-list')?.innerText.includes('Your conversations appear here')")
        guest.fill("#gw-message textarea", "mine")
        guest.press("#gw-message textarea", "Enter")  # a conversation of its own, although the page asked for anna's
        guest.wait_for_selector(".gw-open:has-text('mine')")
        guest.get_by_role("tab", name="Notebook").click()
        note(guest, "a guest's text")
        assert not secrets_in(guest, "half-written")  # its own answer, too
        assert len(place.store.path("anna", info.id)) == 2 and [each.title for each in place.store.listed("guest")] == ["mine"]
        prefix = "/gradio_api" if gradio_compat.SIX else ""
        assert sessions
        for session in sessions:  # guessed by a guest
            found = guest.evaluate(
                "async (path) => { const come = await fetch(path); return [come.status, come.ok ? '' : await come.text()] }",
                f"{prefix}/queue/data?session_hash={session}",
            )
            assert found[0] in (403, 404) and not any(each in found[1] for each in SECRETS)
        anna.reload()
        if gradio_compat.SIX:  # keeps the tab
            anna.wait_for_selector("[role=tab][aria-selected=true]:has-text('Notebook')")
        anna.get_by_role("tab", name="Chat").click()
        anna.wait_for_selector("#gw-live:has-text('half-written')")  # it has gone on
        anna.wait_for_function("document.querySelector('#gw-message textarea').value == 'typed-and-not-sent'")
        assert anna.locator(".gw-open:has-text('mine')").count() == 0
        anna.get_by_role("tab", name="Notebook").click()
        anna.wait_for_function("document.querySelector('#gw-notebook-text textarea').value == 'diary-entry'")
        if not gradio_compat.SIX:
            return  # comparisons are walked on the newest Gradio
        for owner, id in (("anna", info.id), ("guest", place.store.listed("guest")[0].id)):
            place.chats.stop(owner, id, 10)
        anna.get_by_role("tab", name="Compare").click()
        for at, name in (("first", RED), ("second", BLUE)):
            choose(anna, at, name)
        anna.fill("#gw-compare-prompt textarea", "compared-in-secret")
        anna.click("#gw-compare-start")
        anna.wait_for_selector("#gw-compare-answer-1:has-text('It is')")
        boss, _own = enter(browser, place, "boss", "b")  # may compare, too
        boss.get_by_role("tab", name="Compare").click()
        boss.click("#gw-compare-start")
        boss.wait_for_selector("#gw-compare-status:has-text('Choose two different models')")
        assert not secrets_in(boss)
        anna.reload()
        anna.wait_for_selector("#gw-compare-answer-1:has-text('It is')")
