"""ui/: what only a model with weights can show: a long prompt that is being read, and a measured speed."""

import re
import threading
import time
from types import SimpleNamespace

import pytest

from browser import WAIT_MS, chromium
from gptq_webui.core.chat import Message, Token
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine import demo
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.perplexity import measure
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library
from gptq_webui.ui import page as ui_page

pytestmark = [pytest.mark.browser, pytest.mark.demo]

LONG = "Tell me what this is about. " + "The old man and the boy walked along the river until it was dark. " * 120


@pytest.fixture(scope="module")
def house(demo_root, tmp_path_factory):
    """The page over the demo model, which is loaded."""
    library = Library([demo_root])
    engine = Engine(library, Settings(tmp_path_factory.mktemp("settings") / "settings.json"))
    engine.load(demo.folders(demo_root)[0].name)
    chats = ChatService(engine, ChatStore(tmp_path_factory.mktemp("chats") / "chats.sqlite3"))
    page = ui_page.build(engine, Downloads(library), preset="Precise", chats=chats)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    yield SimpleNamespace(engine=engine, url=url, store=chats.store)
    page.close()
    engine.unload()


@pytest.fixture
def tab(house):
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(WAIT_MS)
        tab.goto(house.url)
        tab.wait_for_selector("#gw-head:has-text('4bit')")
        yield tab


def idle(engine):
    deadline = time.monotonic() + 60
    while engine.loaded.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    return not engine.loaded.waiting


def test_a_long_prompt_is_counted_while_it_is_read_and_can_be_stopped(house, tab):
    text = f"Story {time.monotonic_ns()}. {LONG}{LONG}"  # another at every try: what was read is kept
    tab.fill("#gw-message textarea", text)
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-line [role=progressbar]")
    seen = set()
    while len(seen) < 3:  # it moves
        found = re.search(r"Reading your message: ([\d,]+) of ([\d,]+) tokens", tab.inner_text("#gw-line"))
        assert found, tab.inner_text("#gw-line")
        read, whole = (int(each.replace(",", "")) for each in found.groups())
        assert read < whole and whole > 1500
        seen.add(read)
        time.sleep(0.05)
    tab.click("#gw-stop")
    tab.wait_for_selector("#gw-line:has-text('stopped')")  # plain PyTorch may be in the middle of a piece for long
    assert idle(house.engine)
    read = house.engine.loaded._prefix._kept[-1].memory.length
    assert max(seen) <= read < whole  # it ended in the middle, and what was read is kept
    house.store.set(
        "", house.store.listed("")[0].id, parameters={"max_new_tokens": 3}
    )  # the rest of the prompt is what takes long
    tab.click("#gw-regenerate")
    tab.wait_for_selector("#gw-line:has-text('first word after')", timeout=120_000)


def test_the_reading_is_no_event_of_an_answer(house):
    engine = house.engine
    answer = engine.chat([Message("user", LONG + "And now?")], GenerationParams(max_new_tokens=3), threading.Event())
    events = list(answer)
    assert all(isinstance(each, Token) for each in events[:-1]) and events[-1].new_tokens == 3
    assert answer.reading.read_tokens == answer.reading.prompt_tokens == events[-1].prompt_tokens


LINE = (
    r"gptq-webui_SmolLM2\S+: GPTQ 4-bit, group 32, act-order \| transformers[^|]* \| [^|]+ threads? \| [\d.,]+ tokens/s after a "
    r"prompt of 512 \| reads [\d.,]+ tokens/s \| first token after [\d.]+ s \| [\d.]+ [MG]B of memory \| gptq-webui [\d.]+, "
    r"Python .+, torch .+"
)


def test_the_benchmark_button_writes_a_line_to_copy_and_can_be_stopped(house, tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=house.url.rstrip("/"))
    tab.get_by_role("tab", name="Model").click()
    tab.click("#gw-benchmark")
    tab.wait_for_selector("#gw-benchmark-note [role=progressbar]")
    tab.click("#gw-benchmark-stop")
    tab.wait_for_selector("#gw-benchmark-note:has-text('Stopped before')")
    assert idle(house.engine)
    tab.click("#gw-benchmark")
    tab.wait_for_selector("#gw-benchmark-line textarea", timeout=60_000)
    line = tab.input_value("#gw-benchmark-line textarea")
    assert re.fullmatch(LINE, line), line
    tab.click("#gw-benchmark-copy")
    tab.wait_for_selector("#gw-benchmark-copy:has-text('Copied')")
    assert tab.evaluate("navigator.clipboard.readText()") == line


def test_the_perplexity_of_a_text_is_measured_in_the_page(house, tab):
    tab.get_by_role("tab", name="Model").click()
    tab.click("#gw-perplexity-box > button")
    text = "The sun rises in the east and sets in the west."
    tab.fill("#gw-perplexity-text textarea", text)
    tab.click("#gw-perplexity")
    tab.wait_for_selector("#gw-perplexity-line textarea", timeout=120_000)
    shown = tab.input_value("#gw-perplexity-line textarea")
    found = re.search(r"perplexity ([\d.]+) over (\d+) tokens of your text", shown)
    wanted = measure(house.engine, text, "the same", threading.Event())
    assert found and (float(found[1]), int(found[2])) == (pytest.approx(wanted.perplexity, rel=1e-3), wanted.tokens)
    tab.fill("#gw-perplexity-text textarea", "x")
    tab.click("#gw-perplexity")
    tab.wait_for_selector("#gw-perplexity-note:has-text('too few to predict one')")
