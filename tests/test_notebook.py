"""engine/notebook.py and ui/notebook_tab.py: a text that the model goes on with, kept for each login, on a real page."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from browser import WAIT_MS, chromium, type_into
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.errors import Busy, GptqWebuiError
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.notebook import Notebooks
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.notebook_tab import compared, read_list

PARAMS = GenerationParams(max_new_tokens=100)
ANSWER = " and <b>then</b> it rained all day long"


class ScoringModel(FakeModel):
    """Reports the likeliest tokens: its end, and two words."""

    can = FakeModel.can | {"logprobs"}

    def _steps(self, ids, params, cancel):
        if params.logprobs is None:
            yield from super()._steps(ids, params, cancel)
            return
        words = [self.tokenizer._id(each) for each in ("</s>", " <img", " sun")]
        yield Finish("stop", prompt_tokens=len(ids), end=Step(words[0], -0.5, tuple(zip(words, (-0.5, -1.5, -3.0), strict=True))))


class ScoringLoader(FakeLoader):
    def load(self, model, options, progress):
        progress(1.0, "Ready")
        return ScoringModel(model, options)


@pytest.fixture
def engine(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [ScoringLoader()])
    engine.load(MISTRAL, options={"answer": ANSWER, "tokens_per_s": 0.0})
    yield engine
    engine.unload()


def test_the_model_goes_on_between_what_is_before_and_after_and_undo_brings_all_back(engine, tmp_path):
    books = Notebooks(engine, tmp_path / "books")
    assert books.generate("", "Once", " THE END", PARAMS).wait(30)
    assert books.text("") == f"Once{ANSWER} THE END" and books.can("") == (True, False)
    assert books.undo("") == "Once THE END" and books.redo("") == f"Once{ANSWER} THE END"
    assert books.undo("") == "Once THE END" and books.undo("") == "" and books.undo("") == ""
    again = Notebooks(engine, tmp_path / "books")  # the program was started again
    assert again.text("") == "" and again.redo("") == "Once THE END"
    assert again.text("ann") == ""  # of somebody else


def test_what_is_typed_in_one_go_is_one_step(engine, tmp_path):
    books = Notebooks(engine, tmp_path)
    for text in ("a", "ab", "abc"):
        books.save("", text)
    assert books.undo("") == ""
    with pytest.raises(GptqWebuiError, match="2,000,000 characters"):
        books.save("", "x" * 2_000_001)
    books.save("", "broken \ud800\0")
    assert Notebooks(engine, tmp_path).text("") == "broken \ufffd"


def test_stop_keeps_what_was_written_and_nothing_else_changes_meanwhile(engine, tmp_path):
    engine.load(MISTRAL, options={"answer": "word " * 500, "tokens_per_s": 50.0})
    books = Notebooks(engine, tmp_path)
    answer = books.generate("", "A ", " Z", GenerationParams(max_new_tokens=400))
    while "word" not in books.text(""):
        time.sleep(0.02)
    books.save("", "typed over it")
    with pytest.raises(Busy):
        books.generate("", "A", "", PARAMS)
    books.stop("")
    assert answer.wait(30) and books.text("").startswith("A word") and books.text("").endswith(" Z")


def test_a_failed_answer_leaves_the_text(engine, tmp_path):
    engine.unload()
    books = Notebooks(engine, tmp_path)
    answer = books.generate("", "kept", "", PARAMS)
    assert answer.wait(30) and answer.error and books.text("") == "kept"


def test_the_next_tokens_with_special_ones(engine, tmp_path):
    found = Notebooks(engine, tmp_path).next_tokens("Once")
    assert [(each.text, each.logprob) for each in found] == [("</s>", -0.5), (" <img", -1.5), (" sun", -3.0)]
    engine.loaded.can = frozenset()
    with pytest.raises(GptqWebuiError, match="does not report probabilities"):
        Notebooks(engine, tmp_path).next_tokens("Once")


def test_two_lists_stand_side_by_side_and_what_the_browser_kept_may_be_anything():
    tokens = [{"text": "<b>", "id": 1, "logprob": -0.5}, {"text": "x", "id": 2, "logprob": -2.0}]
    now = {"model": "<i>A</i>", "after": "Once", "tokens": tokens}
    earlier = {"model": "B", "after": "Once", "tokens": [{"text": "<b>", "id": 7, "logprob": -1.0}]}
    html = compared(now, earlier)
    assert "&lt;b&gt;" in html and "<b>" not in html and "<i>A" not in html
    assert "60.65 %" in html and "36.79 %" in html and "+0.50" in html and "not among them" in html
    for kept in ("", "[]", "{", '{"tokens": 1}', '{"model": 1, "after": 2, "tokens": [{"text": 1, "id": "x", "logprob": 1}]}'):
        assert read_list(kept) is None
    assert read_list('{"model": "a", "after": "b", "tokens": []}') == {"model": "a", "after": "b", "tokens": []}


@pytest.fixture
def page(engine):
    page = ui_page.build(engine, Downloads(engine.library))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(WAIT_MS)
        yield SimpleNamespace(tab=tab, url=url)
    page.close()


AREA = "#gw-notebook-text textarea"


def open_notebook(page):
    page.tab.goto(page.url)
    page.tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')", state="attached")  # after a reload the notebook is open
    time.sleep(0.3)  # the page has chosen its first tab
    page.tab.get_by_role("tab", name="Notebook").click()
    page.tab.wait_for_selector(AREA, state="visible")


def has_text(page, text):
    page.tab.wait_for_function(f"text => document.querySelector('{AREA}').value === text", arg=text)


@pytest.mark.browser
def test_the_tab_writes_from_the_cursor_undoes_counts_and_survives_a_reload(page, engine):
    open_notebook(page)
    tab = page.tab
    tab.click(AREA)
    tab.keyboard.type("Once THE END")
    tab.wait_for_selector("#gw-notebook-line:has-text('3 of 2,048 tokens')")
    for _ in " THE END":
        tab.keyboard.press("ArrowLeft")
    tab.click("#gw-notebook-write")
    has_text(page, f"Once{ANSWER} THE END")
    tab.wait_for_selector("#gw-notebook-write", state="visible")
    cursor = f"() => document.querySelector('{AREA}').selectionEnd === {len('Once' + ANSWER)}"
    tab.wait_for_function(cursor)
    tab.click("#gw-notebook-undo")
    has_text(page, "Once THE END")
    tab.click("#gw-notebook-redo")
    has_text(page, f"Once{ANSWER} THE END")
    tab.click("#gw-notebook-next")
    rows = tab.locator("#gw-notebook-table tbody tr")
    rows.nth(2).wait_for()
    assert "</s>" in rows.nth(0).inner_text() and "·<img" in rows.nth(1).inner_text() and "60.65 %" in rows.nth(0).inner_text()
    engine.loaded.model = replace(engine.loaded.model, folder=engine.loaded.model.folder.with_name("Other model"))
    tab.click("#gw-notebook-next")
    tab.wait_for_selector(f"#gw-notebook-table th:has-text('Before: {MISTRAL}')")
    assert "+0.00" in rows.nth(0).inner_text() and "Other model" in tab.inner_text("#gw-notebook-table thead")
    engine.loaded.model = replace(engine.loaded.model, folder=engine.loaded.model.folder.with_name(MISTRAL))
    open_notebook(page)
    has_text(page, f"Once{ANSWER} THE END")


@pytest.mark.browser
def test_a_reload_while_the_model_writes_finds_it_going_on_and_stop_ends_it(page, engine):
    engine.load(MISTRAL, options={"answer": "word " * 900, "tokens_per_s": 4.0})
    open_notebook(page)
    type_into(page.tab, AREA, "Go")
    page.tab.click("#gw-notebook-write")
    page.tab.wait_for_function(f"() => document.querySelector('{AREA}').value.includes('word')")
    open_notebook(page)
    page.tab.wait_for_function(f"() => document.querySelector('{AREA}').value.includes('word')")
    page.tab.click("#gw-notebook-stop")
    page.tab.wait_for_selector("#gw-notebook-write", state="visible")
    assert page.tab.input_value(AREA).startswith("Goword")
