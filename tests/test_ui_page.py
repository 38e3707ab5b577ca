"""ui/: a real browser on the real page, with a model that has no weights."""

import re
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from browser import WAIT_MS, chromium, type_into
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.models import OPENED_BY
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.base import Refusal
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeOptions
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser

ANSWER = "The capital of France is Paris, <b>a city</b> <img src=x onerror='window.hacked=1'> on the Seine."
LONG = " ".join(f"word{at}" for at in range(400))


@dataclass(frozen=True)
class Options(FakeOptions):
    answer: str = ANSWER
    load_s: float = 0.3
    context_tokens: int = field(default=2048, metadata={"label": "Context length", "help": "Tokens."})


class Loader(FakeLoader):
    options = Options

    def refusal(self, model, options):
        return Refusal(OPENED_BY[model.kind]) if model.kind in OPENED_BY else None


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page, served once for all tests, and what is behind it."""
    library = FakeLibrary(tmp_path_factory.mktemp("models"))
    engine = Engine(library, Settings(tmp_path_factory.mktemp("settings") / "settings.json"), [Loader()])
    page = ui_page.build(engine, Downloads(library), banner="A card is present & unused.")
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    yield SimpleNamespace(engine=engine, library=library, url=url)
    page.close()


@pytest.fixture
def house(served, tmp_path):
    """The same, with nothing loaded and nothing remembered."""
    served.library.__init__(tmp_path)
    served.engine.settings.__init__(tmp_path / "settings.json")  # its parts hold the same
    yield served
    served.engine.unload()


@pytest.fixture
def visit(chrome, house):
    """Opens the page for a fresh visitor; with `options`, the model is loaded with these before."""
    contexts = []

    def open_page(options=None, width=1280, height=800):
        if options is not None:
            house.engine.load(MISTRAL, options=options)
        contexts.append(chrome.new_context(viewport={"width": width, "height": height}))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.goto(house.url)
        settled(tab, house)
        return tab

    yield open_page
    for context in contexts:
        context.close()


def settled(tab, house):
    """Wait until the page has arranged itself: an empty engine shows the Model tab first."""
    if house.engine.loaded is None:
        tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")
    else:
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
        time.sleep(0.2)  # what the browser kept comes back


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


def choose(tab, box, name):
    """Pick from a list; one that the server fills at this very moment is closed and opened again."""
    option = tab.get_by_role("option", name=name)
    for _again in range(5):
        tab.click(f"{box} input")
        try:
            option.click(timeout=1500)
            return
        except Exception:
            tab.click("#gw-title")
    option.click()


def ask(tab, text):
    tab.fill("#gw-message textarea", text)
    tab.press("#gw-message textarea", "Enter")


def wait_for(tab, selector, text):
    tab.wait_for_selector(f"{selector}:has-text({text!r})")
    return tab.inner_text(selector)


def test_choose_a_model_ask_and_come_back(visit, house):
    tab = visit()
    wait_for(tab, "#gw-banner", "A card is present & unused.")
    choose(tab, "#gw-models", re.compile("GPTQ 4-bit, group 32, act-order"))
    wait_for(tab, "#gw-model-status", "Ready.")
    facts = wait_for(tab, "#gw-facts", "32 weights share a scale")
    assert "4.57 GB" in facts and "2048 tokens" in facts
    open_tab(tab, "Chat")
    assert "Template: ChatML" in wait_for(tab, "#gw-head", MISTRAL)
    ask(tab, "What is the capital of France?")
    line = wait_for(tab, "#gw-line", "tokens")
    assert "first word after" in wait_for(tab, "#gw-line", "first word after"), line
    assert "<b>a city</b>" in tab.inner_text("#gw-chat")  # shown as it was written …
    assert tab.evaluate("window.hacked") is None  # … and not run
    house.engine.unload()
    tab.reload()
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Chat')")  # the tab that was open
    assert "What is the capital of France?" in wait_for(tab, "#gw-chat", "on the Seine.")
    wait_for(tab, "#gw-head", "No model is loaded")


def test_a_model_of_another_kind_says_what_opens_it_and_the_loaded_one_stays(visit, house):
    tab = visit({})
    open_tab(tab, "Model")
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")
    choose(tab, "#gw-models", "zephyr-AWQ — AWQ")
    assert "vLLM" in wait_for(tab, "#gw-model-status .gw-bad", "AWQ weights of this layout are opened by")
    assert house.engine.loaded.model.name == MISTRAL
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")


def test_clear_in_the_middle_of_an_answer_clears(visit, house):
    tab = visit({"answer": LONG, "tokens_per_s": 5})
    ask(tab, "Count")
    wait_for(tab, "#gw-chat", "word3")
    tab.click("#gw-clear")
    tab.wait_for_selector("#gw-send", state="visible")
    tab.wait_for_function("!document.querySelector('#gw-chat').innerText.includes('word3')")
    time.sleep(1)
    assert "word3" not in tab.inner_text("#gw-chat")
    tab.reload()
    settled(tab, house)
    assert "word3" not in tab.inner_text("#gw-chat")


def test_stop_keeps_what_was_written_continue_goes_on(visit, house):
    tab = visit({"answer": LONG, "tokens_per_s": 2})
    ask(tab, "Talk")
    wait_for(tab, "#gw-chat", "word5")
    tab.click("#gw-stop")
    wait_for(tab, "#gw-line", "stopped")
    tab.wait_for_selector("#gw-send:visible")
    wait_for(tab, "#gw-past .gw-figures", "stopped")  # the complete message is drawn, not the one that is written
    kept = tab.inner_text("#gw-chat")
    computed = house.engine.loaded.computed_tokens
    assert "word5" in kept and "word399" not in kept
    time.sleep(0.3)
    assert house.engine.loaded.computed_tokens == computed
    tab.click("#gw-continue")
    tab.wait_for_selector("#gw-stop:visible")
    wait_for(tab, "#gw-chat", f"word{len(re.findall('word[0-9]', kept)) + 2} ")
    tab.click("#gw-stop")
    tab.wait_for_selector("#gw-send:visible")
    assert kept.split("Talk")[-1].strip()[:40] in tab.inner_text("#gw-chat")


def test_the_answer_of_a_page_that_is_closed_goes_on_and_is_found_in_the_list(visit, house):
    tab = visit({"answer": LONG, "tokens_per_s": 100})
    ask(tab, "Talk on, " + str(time.time()))
    wait_for(tab, "#gw-chat", "word5")
    tab.goto("about:blank")
    other = visit()
    other.click(".gw-open >> nth=0")
    wait_for(other, "#gw-chat", "word399")
    other.wait_for_selector("#gw-send:visible")
    assert not house.engine.loaded.waiting


def test_a_reload_in_the_middle_of_an_answer_finds_it_going_on(visit, house):
    tab = visit({"answer": LONG, "tokens_per_s": 5})
    ask(tab, "Talk")
    wait_for(tab, "#gw-chat", "word10")
    tab.reload()
    settled(tab, house)
    assert "word5 " in wait_for(tab, "#gw-chat", "word25")
    tab.click("#gw-stop")
    tab.wait_for_selector("#gw-send:visible")
    assert "Talk" in tab.inner_text("#gw-chat") and "word25" in tab.inner_text("#gw-chat")


def test_two_pages_wait_for_each_other(visit, house):
    tab = visit({"answer": LONG, "tokens_per_s": 2})
    second = visit()
    ask(tab, "First")
    wait_for(tab, "#gw-chat", "word5")
    ask(second, "Second")
    wait_for(second, "#gw-line", "Waiting for another answer to end (2nd in the queue)")
    tab.click("#gw-stop")
    wait_for(second, "#gw-chat", "word5")


def test_errors_are_words_and_what_was_typed_survives(visit):
    tab = visit()
    open_tab(tab, "Chat")
    ask(tab, "Is anybody there?")
    wait_for(tab, "#gw-line .gw-bad", "No model is loaded. Choose one in the Model tab.")
    tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'Is anybody there?'")
    tab = visit({"context_tokens": 20})
    ask(tab, LONG)
    wait_for(tab, "#gw-line .gw-bad", "Shorten it")
    tab.wait_for_function(f"document.querySelector('#gw-message textarea').value.length == {len(LONG)}")


def test_parameters_reach_the_answer_and_survive_a_reload(visit, house):
    tab = visit({})
    open_tab(tab, "Parameters")
    choose(tab, "#gw-preset", "Precise")
    tab.wait_for_function("document.querySelector('#gw-temperature input[type=number]').value == '0'")
    tab.fill("#gw-max_new_tokens input", "3")
    tab.wait_for_function("(localStorage.getItem('gptq-webui parameters') || '').includes('\"max_new_tokens\": 3')")
    open_tab(tab, "Chat")
    tab.reload()
    settled(tab, house)
    ask(tab, "What is the capital of France?")  # without opening the tab
    wait_for(tab, "#gw-line", "stopped at the limit of 3 tokens: press Continue")
    open_tab(tab, "Parameters")
    tab.wait_for_function("document.querySelector('#gw-max_new_tokens input').value == '3'")


def test_download_pause_reload_resume_done_refresh(visit, house):
    tab = visit()
    house.library.pause_s = 1.0
    tab.fill("#gw-download-ref textarea, #gw-download-ref input", "owner/nowhere")
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads .gw-bad", "There is no repository owner/nowhere")
    tab.click("#gw-cancel-0")
    tab.fill("#gw-download-ref textarea, #gw-download-ref input", "owner/name:4bit")
    tab.click("#gw-download")
    assert "1.00 GB in 9 files, GPTQ 4-bit" in wait_for(tab, "#gw-downloads", "left")
    tab.reload()
    wait_for(tab, "#gw-downloads", "left")  # found again
    tab.click("#gw-pause-0")
    wait_for(tab, "#gw-downloads", "Paused at")
    house.library.pause_s = 0.02
    tab.click("#gw-resume-0")
    wait_for(tab, "#gw-downloads", "Done. owner_name_4bit is ready")
    choose(tab, "#gw-models", re.compile("owner_name_4bit — GPTQ"))
    wait_for(tab, "#gw-model-status", "Ready. owner_name_4bit was loaded")


def test_folders_and_settings_are_remembered(visit, house, tmp_path):
    other = tmp_path / "other models"
    other.mkdir()
    tab = visit()
    open_tab(tab, "Model")
    tab.get_by_role("button", name="Models folders").click()
    tab.fill("#gw-folder textarea, #gw-folder input", str(tmp_path / "nowhere"))
    tab.click("#gw-folder-add")
    wait_for(tab, "#gw-folder-note .gw-bad", "There is no folder")
    for refused in ("/proc", "/sys/class", "/etc"):
        tab.fill("#gw-folder textarea, #gw-folder input", refused)
        tab.click("#gw-folder-add")
        wait_for(tab, "#gw-folder-note .gw-bad", refused)
    assert house.library.roots == (tmp_path,)
    tab.fill("#gw-folder textarea, #gw-folder input", str(other))
    tab.click("#gw-folder-add")
    wait_for(tab, "#gw-folder-note", "was added and is remembered")
    assert house.library.roots == (tmp_path, other) and other in house.engine.settings.models_folders
    tab.get_by_label(str(other)).click()
    tab.click("#gw-folder-remove")
    wait_for(tab, "#gw-folder-note", "Its files are untouched")
    assert house.library.roots == (tmp_path,)
    tab = visit({})
    open_tab(tab, "Model")
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")
    tab.get_by_role("button", name="Custom settings").click()
    type_into(tab, "#gw-option-context_tokens input", "512")
    tab.click("#gw-save")
    wait_for(tab, "#gw-settings", "Saved for")
    tab.click("#gw-reload-settings")
    wait_for(tab, "#gw-facts", "512 tokens")


def test_the_chat_template_can_be_changed(visit, house):
    tab = visit({})
    tab.get_by_role("button", name="Conversation settings").click()
    choose(tab, "#gw-template", "Alpaca")
    wait_for(tab, "#gw-head", "Template: Alpaca, your choice")
    assert house.engine.loaded.template.name == "Alpaca"
    assert house.engine.settings.for_model(MISTRAL)["template"] == "Alpaca"


@pytest.mark.parametrize("width", [320, 360, 390, 768])
def test_a_page_with_a_banner_scrolls_down_only(visit, width):
    tab = visit({}, width, 844)
    wait_for(tab, "#gw-banner", "A card is present")
    for text in ("/home/somebody/" + "x" * 90, "pip install torch --index-url https://download.pytorch.org/whl/cu130 " * 3):
        tab.evaluate("text => document.querySelector('.gw-banner').textContent = text", text)
        for name in ("Model", "Chat"):
            open_tab(tab, name)
            tab.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")
            assert tab.evaluate("document.documentElement.scrollWidth") == width, (text, name)
            box = tab.locator(".gw-banner").bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
            assert tab.evaluate("(at => at.scrollWidth - at.clientWidth)(document.querySelector('.gw-banner'))") <= 0


def test_a_phone_scrolls_down_only(visit):
    tab = visit({}, 390, 844)
    for name in ("Model", "Parameters", "Chat"):
        open_tab(tab, name)
        time.sleep(0.3)
        assert tab.evaluate("document.documentElement.scrollWidth") == 390, name
    box = tab.locator("#gw-more").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 844  # everything one needs to chat is in sight
