"""ui/: sixty presses of a button that begins something long, and the page still answers everybody."""

import threading
import time
from types import SimpleNamespace

import pytest
from gradio_events import Visitor, indexes

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.errors import AnswerFailed
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.hub import model_repair, verification
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import benchmark_box, branch_box, gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.parameters_tab import to_values

PRESSES = 60
SOON_S = 2.0  # more than on a quiet page


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A page whose Hub and disk do not come to an end before `go`."""
    place = SimpleNamespace(go=threading.Event(), began=0)
    patch = pytest.MonkeyPatch()

    def hang(*_args, **_options):
        place.began += 1
        place.go.wait(300)
        raise AnswerFailed("The test is over.")

    def hanging(*_args, **_options):
        yield from hang()

    patch.setattr(branch_box, "read_branches", hang)
    patch.setattr(benchmark_box, "measure", hang)
    patch.setattr(verification, "verify", hanging)
    patch.setattr(model_repair, "repair", hanging)
    patch.setattr(model_repair, "check_update", hang)
    library = FakeLibrary(tmp_path_factory.mktemp("models"))
    patch.setattr(library, "plan", hang)
    engine = Engine(library, Settings(tmp_path_factory.mktemp("settings") / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    downloads = Downloads(library)
    chats = ChatService(engine, ChatStore(tmp_path_factory.mktemp("chats") / "chats.sqlite3"))
    page = ui_page.build(engine, downloads, chats=chats)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    place.__dict__.update(engine=engine, page=page, url=url, downloads=downloads, chats=chats)
    yield place
    place.go.set()
    page.close()
    patch.undo()
    engine.unload()


def chat(served, text="What is the capital of France?") -> tuple[float, str]:
    """(seconds, what the page gets at the end) of one question, asked by another visitor."""
    send = indexes(served.page, "chat_actions", "handle")[0]
    (follow,) = indexes(served.page, "chat_tab", "follow")
    settle = next(at for at, each in served.page.fns.items() if each.trigger_after == follow)
    values = to_values(ui_page.parameters_tab.PRESETS["Precise"])
    with Visitor(served.url) as visitor:
        began = time.monotonic()
        visitor.call(send, ["[]", "", "", "", text, "", "", "", [], *values])
        id = served.chats.store.listed("")[0].id
        visitor.call(follow, [f"{id} x"])
        _message, seen = visitor.call(settle, ["", id, "", "", "", "", "", "", []])
        return time.monotonic() - began, seen


def until(done) -> None:
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done()


PRESSED = [
    ("download_box", "start", 0, ["Owner/Name-{at}", False], 1),
    ("download_box", "start", 0, ["Owner/Other-{at}", False], PRESSES),
    ("branch_box", "show", 0, ["Owner/Name-{at}", 4096], 1),
    ("branch_box", "show", 0, ["Owner/Name", 4096], PRESSES),
    ("measure_box", "run", 0, [], PRESSES),
    ("library_box", "run", 0, [MISTRAL], 1),  # look for an update
    ("library_box", "run", 1, [MISTRAL], 1),  # verify
    ("library_box", "run", 2, [MISTRAL], PRESSES),  # repair
]


@pytest.mark.parametrize(("module", "name", "which", "data", "pages"), PRESSED)
def test_a_chat_is_answered_after_sixty_presses(served, module, name, which, data, pages):
    quiet_s, seen = chat(served)
    assert "Paris" in seen
    index, began = indexes(served.page, module, name)[which], served.began
    (watch, *_others) = indexes(served.page, "job_watcher", "watch")
    visitors = [Visitor(served.url) for _ in range(pages)]
    try:
        for at in range(PRESSES):
            visitor = visitors[at % pages]
            visitor.press(index, [each.format(at=at) if isinstance(each, str) else each for each in data])
            visitor.press(watch, [])  # as a browser does when the press has returned
            if at < pages:
                visitor.stay()
        until(lambda: served.began > began or len(served.downloads.active()) > 50)
        took_s, seen = chat(served)
        assert "Paris" in seen
        print(f"{module}: {quiet_s:.2f} s on a quiet page, {took_s:.2f} s after {PRESSES} presses of {pages} pages")
        assert took_s < quiet_s + SOON_S
    finally:
        served.go.set()  # what was begun ends
        served.go = threading.Event()
        for each in visitors:
            each.__exit__()


def test_a_load_that_lasts_leaves_the_page_alive(served):
    """Sixty presses of Reload from sixty pages: the message says that it waits, the settings can be changed."""
    (press, *_others) = indexes(served.page, "model_tab", "load")
    (watch, *_others) = indexes(served.page, "job_watcher", "watch")
    served.engine.settings.save_for_model(MISTRAL, options={"load_s": 20.0})
    visitors = [Visitor(served.url) for _ in range(PRESSES)]
    try:
        for visitor in visitors:
            visitor.press(press, [MISTRAL])
            visitor.press(watch, [])
            visitor.stay()
        until(lambda: served.engine.status.phase == "loading")
        (edited, *_others) = indexes(served.page, "parameters_tab", "edited")
        began = time.monotonic()
        with Visitor(served.url) as other:
            message, _seen = other.call(edited, ["Model card", "", "", *to_values(ui_page.parameters_tab.PRESETS["Creative"])])
        assert message["success"] and "Creative" in str(message["output"])
        assert time.monotonic() - began < SOON_S and served.engine.status.phase == "loading"
    finally:
        served.engine.settings.save_for_model(MISTRAL, options=None)
        until(lambda: served.engine.status.phase == "ready")
        for visitor in visitors:
            visitor.__exit__()
    assert "Paris" in chat(served)[1]


def test_no_handler_may_take_all_places(served):
    """Gradio runs 40 events at a time. Kinds that last have limits that leave room for all others."""
    limits = {}
    for each in served.page.fns.values():
        if each.fn is None or not each.queue:
            continue
        assert each.concurrency_limit is not None, each.fn  # None would be all of them
        if each.concurrency_limit != "default":
            limits[each.concurrency_id] = each.concurrency_limit
    assert sum(limits.values()) < 40 and len(limits) >= 4
    lasting = [each for each in served.page.fns.values() if each.fn is not None and each.types_generator]
    assert {each.concurrency_id for each in lasting} == {
        gradio_compat.WATCH["concurrency_id"],
        gradio_compat.ANSWER["concurrency_id"],
    }


@pytest.mark.browser
def test_sixty_presses_in_a_real_page(served):
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(WAIT_MS)
        tab.goto(served.url)
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
        ask(tab)  # the first answer of a page also pays for what a page loads later
        quiet_s = ask(tab)
        tab.get_by_role("tab", name="Model").click()
        tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")
        for at in range(PRESSES):
            tab.fill("#gw-download-ref textarea, #gw-download-ref input", f"Owner/Model-{at}")
            began = time.monotonic()
            tab.click("#gw-download")
            print(f"press {at} took {time.monotonic() - began:.2f} s")
        tab.wait_for_selector("#gw-downloads-more:has-text('more downloads are not shown')")
        tab.get_by_role("tab", name="Chat").click()
        assert ask(tab) < quiet_s + SOON_S


def ask(tab) -> float:
    tab.click("#gw-new")
    tab.wait_for_function("!document.querySelector('#gw-chat').innerText.includes('Paris')")
    tab.fill("#gw-message textarea", "What is the capital of France?")
    began = time.monotonic()
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-chat:has-text('Paris')")
    return time.monotonic() - began
