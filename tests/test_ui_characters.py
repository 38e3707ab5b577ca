"""ui/character_box.py: characters, personas and system prompts on a real page."""

import json
import socket
import time
from types import SimpleNamespace

import pytest
from test_characters import TGWUI, V1, V2, V3, png, text_chunk, zipped

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app.web_server import WebServer
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser
EVIL = '<img src="http://outside.invalid/x" onerror="document.title=\'ran\'"><script>document.title="ran"</script>'


@pytest.fixture
def house(tmp_path):
    """The page as the server process serves it: nothing can be uploaded to it."""
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL, options={"answer": "Warm bread."})
    chats = ChatService(engine)
    page = ui_page.build(engine, Downloads(engine.library), chats=chats)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(ui_page.application(page), "127.0.0.1", port)
    web.start()
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(WAIT_MS)
        fetched = []
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(f"http://127.0.0.1:{port}")
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
        yield SimpleNamespace(tab=tab, chats=chats, fetched=fetched)
    web.stop()
    engine.unload()


def open_box(tab):
    if not tab.is_visible("#gw-character input"):
        tab.get_by_role("button", name="Conversation settings").click()
    tab.wait_for_selector("#gw-character input", state="visible")


def bring(tab, name, content, button="#gw-character-import"):
    with tab.expect_file_chooser() as chooser:
        tab.click(button)
    chooser.value.set_files({"name": name, "mimeType": "application/octet-stream", "buffer": content})


def chosen(tab, name):
    tab.wait_for_function(f"document.querySelector('#gw-character input').value === {json.dumps(name)}")


def test_a_picture_is_imported_greets_is_answered_to_edited_deleted_and_brought_back(house):
    tab = house.tab
    open_box(tab)
    tab.get_by_role("button", name="Your persona").click()
    tab.fill("#gw-persona-name textarea, #gw-persona-name input", "Tom")
    tab.fill("#gw-persona-words textarea", "new in town")
    tab.click("#gw-persona-save")
    tab.wait_for_selector("#gw-character-note:has-text('Saved')")
    bring(tab, "mia.png", png(text_chunk(b"chara", V2)))
    chosen(tab, "Mia")
    tab.wait_for_selector("#gw-past:has-text('Hello, Tom!')")
    tab.fill("#gw-message textarea", "Is the oven on?")
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-chat:has-text('Warm bread.')")
    (info,) = house.chats.store.listed("")
    assert info.character["name"] == "Mia" and info.character["persona"]["name"] == "Tom"
    first, *_ = house.chats.store.path("", info.id)
    assert first.text == "Hello, Tom!" and first.versions == 2
    tab.click("#gw-character-edit")
    tab.wait_for_selector("#gw-character-book:has-text('4 entries')")
    tab.fill("#gw-character-name textarea, #gw-character-name input", "Mia the baker")
    tab.click("#gw-character-save")
    chosen(tab, "Mia the baker")
    tab.click("#gw-character-delete")
    tab.wait_for_selector("#gw-character-note:has-text('was deleted')")
    tab.click("#gw-character-undo")
    tab.wait_for_selector("#gw-character-note:has-text('is back')")
    assert house.chats.store.get("", info.id).character["name"] == "Mia the baker"


def test_every_kind_of_file_brings_its_character_and_the_model_gets_its_lorebook(house):
    tab = house.tab
    open_box(tab)
    files = {
        "Mia 1": ("v1.png", png(text_chunk(b"chara", V1 | {"name": "Mia 1"}))),
        "Mia V3": ("v3.png", png(text_chunk(b"ccv3", V3))),
        "Mia 4": ("mia.yaml", TGWUI.replace(b"Mia", b"Mia 4")),
        "Mia 5": ("mia.charx", zipped("card.json", json.dumps(V2 | {"data": V2["data"] | {"name": "Mia 5"}}))),
        "Mia 6": ("mia.json", json.dumps(V2 | {"data": V2["data"] | {"name": "Mia 6"}}).encode()),
    }
    for name, (file, content) in files.items():
        bring(tab, file, content)
        chosen(tab, name)
    tab.fill("#gw-message textarea", "Is the oven on?")
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-chat:has-text('Warm bread.')")
    tab.click("button.gw-meter")
    for words in ("Mia 6 is a baker.", "The oven is hot.", "It is morning.", "Stay in role."):
        tab.wait_for_selector(f"#gw-prompt pre:has-text('{words}')")
    assert "Rye is dark." not in tab.inner_text("#gw-prompt")
    assert len(house.chats.store.listed("")) >= 1


def test_hostile_files_run_nothing_fetch_nothing_and_are_refused_in_words(house):
    tab = house.tab
    open_box(tab)
    greeting = EVIL + " [x](javascript:document.title='ran') ![b](http://outside.invalid/b)"
    data = {"name": EVIL[:90], "description": EVIL, "first_mes": greeting, "creator_notes": EVIL}
    bring(tab, "<img src=x>.json", json.dumps({"spec": "chara_card_v2", "data": data}).encode())
    tab.wait_for_selector("#gw-past:has-text('img src=')")
    tab.click("#gw-character-edit")
    tab.wait_for_selector("#gw-character-editor", state="visible")
    time.sleep(0.5)
    assert tab.title() != "ran" and [each for each in house.fetched if "outside" in each] == []
    assert not tab.locator("#gw-past .message img").count()
    for content, words in ((b"x" * 5_000_000, "a text may have"), (b"\xff\xfe", "UTF-8"), (png(), "carries no character")):
        bring(tab, "evil.png", content)
        tab.wait_for_selector(f"#gw-character-note .gw-bad:has-text('{words}')")


def test_a_system_prompt_is_saved_and_chosen_again(house):
    tab = house.tab
    open_box(tab)
    tab.get_by_role("button", name="Your persona").click()
    tab.fill("#gw-system textarea", "Answer in rhymes.")
    tab.fill("#gw-prompt-name textarea, #gw-prompt-name input", "Poet")
    tab.click("#gw-prompt-save")
    tab.wait_for_selector("#gw-character-note:has-text('Saved')")
    tab.fill("#gw-system textarea", "")
    tab.click("#gw-prompts input")
    tab.get_by_role("option", name="Poet").click()
    tab.wait_for_function("document.querySelector('#gw-system textarea').value === 'Answer in rhymes.'")
