"""The Compare tab in a real browser, and what its events send: a blind comparison names no model before the vote."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio_events import Visitor, indexes

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.engine.vote_book import VoteBook
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.parameters_tab import to_values

ONE, OTHER = "secret-branch-one", "secret-branch-two"
LISTED = re.compile(r'"choices":\[\[.*?\]\]')
SAID = {ONE: "It is red.", OTHER: "It is <b>blue</b>."}


@pytest.fixture
def served(tmp_path):
    library = FakeLibrary(tmp_path)
    library._models += [replace(library.get(MISTRAL), folder=tmp_path / name) for name in SAID]
    settings = Settings(tmp_path / "settings.json")
    for name, answer in SAID.items():
        settings.save_for_model(name, options={"answer": answer})
    engine = Engine(library, settings, [FakeLoader()])
    engine.load(MISTRAL)
    page = ui_page.build(engine, Downloads(library), chats=ChatService(engine, ChatStore(tmp_path / "chats.sqlite3")))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    yield SimpleNamespace(engine=engine, url=url, page=page)
    page.close()
    engine.unload()


def test_no_event_names_a_model_before_the_vote(served):
    """The press, then the watcher of the page until both answers are there, read as a program reads them."""
    (start,) = indexes(served.page, "compare_tab", "start")
    watch = indexes(served.page, "job_watcher", "watch")[0]
    (deliver,) = indexes(served.page, "job_watcher", "deliver")
    votes = indexes(served.page, "compare_tab", "vote")
    question = [ONE, OTHER, "Which colour?", True, *to_values(GenerationParams())]
    with Visitor(served.url) as visitor:
        before = "".join(visitor.call(index, data)[1] for index, data in ((start, question), (watch, []), (deliver, [])))
        assert (
            "It is red." in before and "&lt;b&gt;blue" in before and "Which answer is better? You asked: Which colour?" in before
        )
        before = LISTED.sub("", before)  # the Model tab's list has every model, whatever is compared
        assert not any(name in before for name in SAID)
        assert not any(word in before for word in ("Tokens/s", "First token")), "figures would tell the models apart"
    with Visitor(served.url) as visitor:
        visitor.call(votes[0], [])
        after = "".join(visitor.call(index, [])[1] for index in (watch, deliver))
        assert ONE in after and OTHER in after and "Tokens/s" in after
    assert sum(each.won for each in VoteBook().tally("")) == 1


def choose(page, at, name):
    page.fill(f"#gw-compare-{at} input", name)
    page.locator(f"#gw-compare-{at} [role=option]", has_text=name).wait_for()
    page.keyboard.press("Enter")
    page.locator(f"#gw-compare-{at} [role=option]").first.wait_for(state="detached")


@pytest.mark.browser
@pytest.mark.skipif(not gradio_compat.SIX, reason="the page is walked on the newest Gradio")
def test_a_blind_walk_in_a_browser(served):
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        bodies = []
        page.goto(served.url)
        page.wait_for_selector("#gw-head:has-text('Mistral')")
        page.get_by_role("tab", name="Compare").click()
        page.click("#gw-compare-start")
        page.wait_for_selector("#gw-compare-status:has-text('Choose two different models')")
        for at, name in (("first", ONE), ("second", OTHER)):
            choose(page, at, name)
        page.fill("#gw-compare-prompt textarea", "Which colour?")
        page.on("response", lambda answer: bodies.append(answer))
        page.click("#gw-compare-start")
        page.wait_for_selector("#gw-vote-first:visible")
        page.wait_for_selector("#gw-compare-answer-1:has-text('It is')")
        page.wait_for_selector("#gw-compare-models", state="hidden")
        assert not any(name in page.content() for name in SAID)
        shown = page.inner_text("#gw-compare-answer-1") + page.inner_text("#gw-compare-answer-2")
        assert "It is red." in shown and "It is <b>blue</b>." in shown and "Tokens/s" not in shown
        texts = [each.text() for each in list(bodies) if "event-stream" not in each.headers.get("content-type", "")]
        assert not any(name in text for text in texts for name in SAID)

        page.reload()
        page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Compare')")
        page.wait_for_selector("#gw-vote-second:visible")  # it waits for the vote after a reload, too
        page.set_viewport_size({"width": 390, "height": 900})
        boxes = [page.locator(f"#gw-compare-answer-{at}").bounding_box() for at in (1, 2)]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"] and boxes[1]["width"] > 300, "one below the other on a phone"
        page.click("#gw-vote-second")
        page.wait_for_selector("#gw-compare-answer-2:has-text('Tokens/s')")
        page.wait_for_selector("#gw-compare-tally:has-text('Won')")
        text = page.input_value("#gw-compare-markdown textarea")
        assert text.startswith("# Two models, one prompt") and ONE in text and "Blind vote: Answer 2 is better." in text
        with page.expect_download() as saved:
            page.click("#gw-compare-save")
        data = Path(saved.value.path()).read_bytes()
        assert (
            saved.value.suggested_filename == "two-models.png" and data.startswith(b"\x89PNG") and data[16:20] == b"\0\0\x09\x60"
        )
        winner = re.search(r"## Answer 2: (\S+)", text)
        assert winner and VoteBook().tally("")[0].name == winner[1]
        assert served.engine.loaded.model.name == MISTRAL


def test_the_page_as_it_is_fetched_has_no_name_in_it(served):
    config = json.dumps(served.page.config, default=str)
    assert not any(name in config for name in SAID)
