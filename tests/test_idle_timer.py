"""engine/idle_timer.py: it calls back after the minutes, and nothing that is raised ends it."""

import threading
import time
from pathlib import Path

import pytest

from gptq_webui.core.models import LocalModel
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.idle_timer import IdleTimer
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

MODEL = LocalModel(Path("/library/one"), "gptq", None, 10, 2048, "LlamaForCausalLM")
SOON = 0.001  # minutes


class FakeLibrary:
    roots: tuple[Path, ...] = ()

    def get(self, name):
        return MODEL


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def stopped():
    """Timers to stop after the test."""
    timers: list[IdleTimer] = []
    yield timers
    for timer in timers:
        timer.minutes = 0


def test_it_calls_back_when_nobody_touched_it_and_not_before(stopped):
    calls = []
    timer = IdleTimer(lambda: calls.append(time.monotonic()), lambda: False)
    stopped.append(timer)
    began = time.monotonic()
    timer.minutes = 0.005  # 0.3 s
    while time.monotonic() - began < 1.0:
        timer.touch()
        time.sleep(0.01)
    assert not calls
    wait_for(lambda: calls)


def test_what_is_in_use_is_not_idle(stopped):
    calls, used = [], [True]
    timer = IdleTimer(lambda: calls.append(1), lambda: used[0])
    stopped.append(timer)
    timer.minutes = SOON
    time.sleep(0.5)
    assert not calls
    used[0] = False
    wait_for(lambda: calls)


@pytest.mark.parametrize("part", ["expired", "in_use"])
def test_a_callback_that_fails_does_not_end_it(stopped, part):
    calls = []

    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise AttributeError("'NoneType' object has no attribute 'waiting'")
        return False

    timer = IdleTimer(fails_once, lambda: False) if part == "expired" else IdleTimer(lambda: None, fails_once)
    stopped.append(timer)
    timer.minutes = SOON
    wait_for(lambda: len(calls) > 1)


class UnloadedBetween(Engine):
    """An engine whose model is there at the first read of `loaded` and gone at the second."""

    reads = 0

    @property
    def loaded(self):
        if threading.current_thread().name == "gptq-webui idle":
            self.reads += 1
            return self.slot.loaded if self.reads % 2 else None
        return self.slot.loaded


def test_an_unload_between_two_looks_at_the_model_does_not_end_the_watch():
    engine = UnloadedBetween(FakeLibrary(), Settings(), [FakeLoader()])
    engine.load("one")
    engine.set_idle_minutes(0.01)
    wait_for(lambda: engine.reads > 4)
    assert [thread for thread in threading.enumerate() if thread.name == "gptq-webui idle"]
    engine.set_idle_minutes(0)
    engine.unload()


def test_an_idle_model_is_unloaded_and_comes_back_on_use():
    engine = Engine(FakeLibrary(), Settings(), [FakeLoader()])
    engine.load("one", options={"context_tokens": 100})
    engine.set_idle_minutes(SOON)
    wait_for(lambda: engine.status.phase == "empty" and engine.loaded is None)
    assert engine.must_reload_idle and "without use" in engine.status.text
    engine.set_idle_minutes(0)
    assert engine.ready().context_tokens == 100 and not engine.must_reload_idle
    engine.unload()
    assert not engine.must_reload_idle
