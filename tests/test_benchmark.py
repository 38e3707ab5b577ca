"""engine/benchmark.py: one honest line about the loaded model, or a sentence."""

import threading
import time
from pathlib import Path

import pytest

from fake_library import Folder
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadParameter, NotLoaded
from gptq_webui.core.models import LocalModel, remote_model
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine import benchmark
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

WORDS = " ".join(f"w{at}" for at in range(2000))


class FakeLibrary(Folder):
    def get(self, name):
        return LocalModel(Path.home() / "models" / name, "gptq", None, 10, 2048, "LlamaForCausalLM")


@pytest.fixture
def engine(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(), [FakeLoader()])
    yield engine
    engine.unload()


def test_the_reported_speed_is_that_of_the_answers(engine):
    engine.load("m", options={"answer": WORDS, "tokens_per_s": 200})
    doing = []
    found = benchmark.measure(engine, threading.Event(), doing.append)
    assert 100 < found.tokens_per_s <= 200 and found.prompt_tokens == 512 and found.rounds > 1 and not found.shared
    assert found.prompt_tokens_per_s == pytest.approx(512 / found.first_token_s, rel=0.5)
    assert str(found).startswith("m: GPTQ") and "\n" not in str(found) and str(Path.home()) not in str(found)
    assert any("round 2" in each for each in doing)


def test_nothing_loaded_is_refused_in_words(engine):
    with pytest.raises(NotLoaded, match="No model is loaded"):
        benchmark.measure(engine, threading.Event())


def test_a_model_elsewhere_is_refused_in_words(engine):
    engine.load("m")
    engine.loaded.is_remote, engine.loaded.model = True, remote_model("far", served_by="http://x")
    with pytest.raises(BadParameter, match="not this machine's"):
        benchmark.measure(engine, threading.Event())


def test_a_short_context_gets_a_shorter_prompt_and_says_so(engine):
    engine.load("m", options={"answer": WORDS, "context_tokens": 300})
    found = benchmark.measure(engine, threading.Event())
    assert found.prompt_tokens == 150 and "after a prompt of 150" in str(found)


def test_stopping_ends_it_without_a_result(engine):
    engine.load("m", options={"answer": WORDS, "tokens_per_s": 50})
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    began = time.monotonic()
    assert benchmark.measure(engine, cancel) is None and time.monotonic() - began < 2
    assert engine.loaded.waiting == 0


def test_answers_that_were_asked_for_first_come_first(engine):
    engine.load("m", options={"answer": WORDS, "tokens_per_s": 200})
    answer = engine.chat([Message("user", "Hi")], GenerationParams(max_new_tokens=60), threading.Event())
    doing = []
    thread = threading.Thread(target=benchmark.measure, args=(engine, threading.Event(), doing.append))
    thread.start()
    _text, finish = answer.text()
    thread.join(30)
    assert finish.tokens_per_s > 100 and doing[0] == "Waiting for another answer"
