"""engine/slot.py, as the engine uses it: one change at a time, one flag to stop it, and an empty, usable slot after a failure."""

import threading
import time
from pathlib import Path

import pytest

from gptq_webui.core.chat import Message
from gptq_webui.core.errors import Busy, GptqWebuiError, LoadCancelled, LoadFailed, LoadRefused, NoSuchModel
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


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (lambda engine: engine.load("three"), NoSuchModel),
        (lambda engine: engine.load("two", options={"refuse": "needs a GPU"}), LoadRefused),
        (lambda engine: engine.load("two", "exllama9"), LoadRefused),
    ],
)
def test_what_is_refused_leaves_the_loaded_model(load, error, engine):
    loaded = engine.load("one")
    with pytest.raises(error):
        load(engine)
    assert engine.loaded is loaded and engine.status.phase == "ready"
    assert engine.chat(HELLO, GenerationParams(), threading.Event()).text()[0]


def test_a_load_that_fails_leaves_an_empty_usable_engine(engine):
    engine.load("one")
    with pytest.raises(LoadFailed, match="boom") as caught:
        engine.load("two", options={"fail": "boom"})
    assert engine.loaded is None and engine.status.error and engine.status.text == str(caught.value)
    engine.load("two")
    assert engine.status.phase == "ready"


def test_two_loads_at_once_are_one_load_and_a_sentence(engine):
    thread = threading.Thread(target=engine.load, args=("one",), kwargs={"options": {"load_s": 0.5}})
    thread.start()
    time.sleep(0.1)
    with pytest.raises(Busy, match="one is being loaded"):
        engine.load("two")
    with pytest.raises(Busy, match="still being loaded"):
        engine.chat(HELLO, GenerationParams(), threading.Event())
    thread.join()


def test_a_demo_that_cannot_be_made_leaves_a_usable_engine(engine, monkeypatch):
    def fails(*_):
        raise ImportError("DLL load failed")

    monkeypatch.setattr("gptq_webui.engine.demo.ensure", fails)
    with pytest.raises(LoadFailed, match="DLL load failed"):
        engine.load_demo()
    assert engine.status.phase == "empty" and engine.status.error
    engine.load("one")


def making_the_demo(engine, monkeypatch, step_s=0.02):
    """Start `load_demo` with a demo that takes ten seconds to make, and wait for its first step."""
    begun, raised = threading.Event(), []

    def ensure(root, progress, cancel):
        for at in range(int(10 / step_s)):
            if cancel.is_set():
                raise LoadCancelled("Making the demo model was stopped.")
            progress(0.1, f"Step {at}")
            begun.set()
            time.sleep(step_s)
        return [Path("/library/one")]

    def run():
        try:
            engine.load_demo()
        except GptqWebuiError as error:
            raised.append(error)

    monkeypatch.setattr("gptq_webui.engine.demo.ensure", ensure)
    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(5)
    return thread, raised


def test_stop_ends_the_making_of_the_demo(engine, monkeypatch):
    thread, raised = making_the_demo(engine, monkeypatch)
    began = time.monotonic()
    engine.cancel_load()
    thread.join(5)
    assert time.monotonic() - began < 2 and isinstance(raised[0], LoadCancelled)
    assert engine.status.phase == "empty" and "stopped" in engine.status.text and not engine.status.error


def test_free_ends_the_making_of_the_demo_and_unloads(engine, monkeypatch):
    engine.load("two")
    thread, _raised = making_the_demo(engine, monkeypatch)
    engine.free()
    thread.join(5)
    assert not thread.is_alive() and engine.loaded is None and engine.status.phase == "empty"


def test_a_demo_that_is_stopped_leaves_the_loaded_model(engine, monkeypatch):
    loaded = engine.load("two")
    thread, _raised = making_the_demo(engine, monkeypatch)
    engine.cancel_load()
    thread.join(5)
    assert engine.loaded is loaded and engine.status.phase == "ready" and engine.status.name == "two"


def test_a_stop_between_the_demo_and_its_load_is_not_lost(engine, monkeypatch):
    def ensure(root, progress, cancel):
        progress(1.0, "The demo model is ready")
        engine.cancel_load()
        return [Path("/library/one")]

    monkeypatch.setattr("gptq_webui.engine.demo.ensure", ensure)
    with pytest.raises(LoadCancelled):
        engine.load_demo()
    assert engine.loaded is None and engine.status.phase == "empty"
    engine.load("one")  # the stop counts once


def test_a_stop_while_a_load_is_planned_is_not_lost_and_leaves_the_loaded_model(engine, monkeypatch):
    loaded = engine.load("one")
    plan = engine.planner.plan

    def slow_plan(*args, **kwargs):
        engine.cancel_load()
        return plan(*args, **kwargs)

    monkeypatch.setattr(engine.planner, "plan", slow_plan)
    with pytest.raises(LoadCancelled):
        engine.load("two")
    assert engine.loaded is loaded and engine.status.phase == "ready"


@pytest.mark.parametrize("part", ["plan", "load", "template", "watcher", "close"])
def test_whatever_is_raised_in_a_load_ends_in_a_status_that_is_not_loading(engine, monkeypatch, part):
    def breaks(*_args, **_kwargs):
        raise RuntimeError("a fault of ours")

    if part == "plan":
        monkeypatch.setattr("gptq_webui.engine.load_failures.known", breaks)
    elif part == "load":
        monkeypatch.setattr("gptq_webui.engine.load_fallback.attempt", breaks)
    elif part == "template":
        engine.settings.save_for_model("one", template="Vicuna")
        monkeypatch.setattr("gptq_webui.loaders.text.chat_template.ChatTemplate.bound", breaks)
    elif part == "watcher":
        engine.slot.watchers.append(breaks)
    else:
        monkeypatch.setattr(engine.load("two"), "close", breaks)
    try:
        engine.load("one")
        assert part in ("watcher", "template") and engine.status.phase == "ready"
    except LoadFailed as error:
        assert "a fault of ours" in str(error) and engine.status.phase == "empty"
    monkeypatch.undo()
    engine.load("one")
    assert engine.status.phase == "ready"


def test_what_is_learnt_is_written_after_the_load_so_that_a_full_disk_costs_no_model(engine, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptq_webui.engine.settings.os.replace", full)
    engine.load("one")
    assert engine.status.phase == "ready"


def test_a_model_that_is_being_made_is_not_said_to_load(engine):
    engine.slot.progress("The demo model", making=True)(0.5, "Opening the small model")
    assert engine.status.doing == "is being made" and engine.status.phase == "loading"
    engine.slot.progress("Llama")(0.5, "Reading")
    assert engine.status.doing == "is being loaded"
