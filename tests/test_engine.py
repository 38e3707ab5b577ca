"""engine/engine.py: one loaded model, turns in order, and nothing lost by a mistake."""

import threading
import time
from pathlib import Path

import pytest

from gptq_webui.core.chat import Finish, Message, Token
from gptq_webui.core.errors import (
    BadParameter,
    NoSuchModel,
    NotLoaded,
    PromptTooLong,
)
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

HELLO = [Message("user", "hello")]


class FakeLibrary:
    """A library of models that are only names."""

    roots: tuple[Path, ...] = ()

    def get(self, name):
        if name not in ("one", "two"):
            raise NoSuchModel(f"There is no {name}.")
        return LocalModel(Path(f"/library/{name}"), "gptq", None, 10, 2048, "LlamaForCausalLM")


@pytest.fixture
def engine():
    engine = Engine(FakeLibrary(), Settings(), [FakeLoader()])
    yield engine
    engine.unload()


def test_a_chat_without_a_model_says_what_to_do(engine):
    with pytest.raises(NotLoaded, match="Model tab"):
        engine.chat(HELLO, GenerationParams(), threading.Event())


def test_load_chat_unload(engine):
    seen = []
    engine.slot.watchers.append(lambda status: seen.append(status.phase))
    engine.load("one")
    assert engine.chat(HELLO, GenerationParams(), threading.Event()).text()[0] == "The capital of France is Paris."
    engine.unload()
    assert engine.loaded is None and list(dict.fromkeys(seen)) == ["loading", "ready", "unloading", "empty"]


def test_unloading_in_the_middle_of_an_answer_ends_it(engine):
    engine.load("one", options={"answer": "word " * 1000, "tokens_per_s": 200})
    answer = engine.chat(HELLO, GenerationParams(), threading.Event())
    next(answer)
    started = time.perf_counter()
    engine.unload()
    assert time.perf_counter() - started < 1
    assert [event.reason for event in answer if isinstance(event, Finish)] == ["cancelled"]


def test_answers_come_in_the_order_they_were_asked_for(engine):
    loaded = engine.load("one", options={"tokens_per_s": 50})
    ended: list[int] = []

    def ask(at):
        engine.chat(HELLO, GenerationParams(), threading.Event()).text()
        ended.append(at)

    threads = []
    for at in range(5):
        threads.append(threading.Thread(target=ask, args=(at,)))
        threads[-1].start()
        while loaded.waiting + len(ended) <= at:  # it waits in the queue
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert ended == [0, 1, 2, 3, 4]


def test_a_closed_tab_delays_the_next_chat_by_at_most_one_answer(engine):
    loaded = engine.load("one", options={"answer": "word " * 40, "tokens_per_s": 200})
    left = engine.chat(HELLO, GenerationParams(), threading.Event())
    for _ in range(3):
        assert isinstance(next(left), Token)
    asked = time.perf_counter()
    engine.chat(HELLO, GenerationParams(max_new_tokens=1), threading.Event()).text()
    assert time.perf_counter() - asked < 40 / 200 + 0.2
    assert loaded.waiting == 0


def test_one_message_longer_than_the_context_is_a_sentence(engine):
    engine.load("one", options={"context_tokens": 100})
    with pytest.raises(PromptTooLong, match="Shorten it"):
        engine.chat([Message("user", "word " * 200)], GenerationParams(), threading.Event())
    with pytest.raises(PromptTooLong, match="Shorten it"):
        engine.complete("word " * 200, GenerationParams(), threading.Event())


def test_an_answer_that_fills_the_context_cannot_be_continued_and_says_so(engine):
    engine.load("one", options={"context_tokens": 100})
    with pytest.raises(PromptTooLong, match="no room to continue"):
        engine.chat([*HELLO, Message("assistant", "word " * 200)], GenerationParams(), threading.Event())


def test_a_chosen_template_is_remembered_for_the_model(engine):
    engine.load("one")
    engine.set_template("Vicuna")
    engine.load("two")
    assert engine.loaded.template.name == "ChatML"
    engine.load("one")
    assert engine.loaded.template.name == "Vicuna" and engine.loaded.template.stop == ("USER:", "ASSISTANT:")
    with pytest.raises(BadParameter):
        engine.set_template("nonsense")


def test_saved_options_are_used_at_the_next_load(engine):
    engine.settings.save_for_model("one", options={"answer": "saved"})
    engine.load("one")
    assert engine.chat(HELLO, GenerationParams(), threading.Event()).text()[0] == "saved"
