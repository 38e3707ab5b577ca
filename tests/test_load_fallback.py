"""engine/load_fallback.py: planted faults end in a model on the next loader, or in an empty, usable engine."""

import gc
import threading
import time
import weakref

import pytest
import torch

import tiny
from fake_library import Folder
from gptq_webui.core.chat import Finish, Message
from gptq_webui.core.errors import AnswerFailed, BadCheckpoint, GptqWebuiError, LoadCancelled, LoadFailed, NotEnoughMemory
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.gptq.transformers_stepper import TransformersStepper
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # killed on purpose

HELLO = [Message("user", "hello")]
SHORT = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=4)


def calls_its_layers(loaded):
    """The transformers model, computed through its own modules: a step of our own would pass the fault by."""
    if (patch := vars(loaded._stepper).get("_patch")) is not None:
        patch.release()  # the step is in the place of its forward
    loaded._stepper = TransformersStepper(loaded.hf)
    loaded._prefix.clear()  # what another stepper remembers
    return loaded.hf


def memory_in_a_layer(loaded):
    def forward(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    calls_its_layers(loaded).model.layers[1].mlp.forward = forward


def not_numbers(loaded):
    loaded.hf.model.norm.weight.data.fill_(float("nan"))


def dead_thread(loaded):
    def steps(*_):
        raise SystemExit
        yield

    loaded._steps = steps


def one_token(loaded):
    """Greedy sampling that always takes the same token, whatever the logits are."""
    from gptq_webui.core.chat import Step

    def steps(ids, params, cancel):
        for _ in range(params.max_new_tokens):
            yield Step(7)
        yield Finish("length", prompt_tokens=len(ids))

    loaded._steps = steps


def failing_import(_loaded):
    raise OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install root.")


def failing_kernel(loaded):
    def forward(*_args, **_kwargs):
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    calls_its_layers(loaded).model.layers[0].forward = forward


FAULTS = {
    "out of memory in a layer": (memory_in_a_layer, "not enough memory"),
    "logits that are no numbers": (not_numbers, "NaN"),
    "a failing import": (failing_import, "CUDA_HOME"),
    "a broken kernel": (failing_kernel, "illegal instruction"),
    "a killed worker": (dead_thread, "thread ended because"),
}


class Faulty(TransformersLoader):
    """The real loader with a fault planted into what it loaded."""

    name = "faulty"

    def __init__(self, plant):
        super().__init__()
        self.plant = plant
        self.loads = 0
        self.weights = []

    def load(self, model, options, progress):
        self.loads += 1
        loaded = super().load(model, options, progress)
        self.weights = [weakref.ref(parameter) for parameter in loaded.hf.parameters()]
        try:
            self.plant(loaded)
        except Exception:
            loaded.close()
            raise
        return loaded

    @property
    def held(self):
        gc.collect()
        return [each for each in self.weights if each() is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(folder)
    tiny.write_tokenizer(folder, "{{ bos_token }}" + CHATML)
    return folder


@pytest.fixture
def start(folder):
    """Makes an engine over the folder with these loaders."""
    made = []

    def make(*loaders):
        made.append(Engine(Folder(folder.parent), Settings(), loaders))
        return made[-1]

    yield make
    for engine in made:
        engine.unload()


def workers():
    return {thread for thread in threading.enumerate() if thread.name == "gptq-webui model"}


def answer(engine):
    return engine.chat(HELLO, SHORT, threading.Event()).text()


@pytest.mark.parametrize(("plant", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_in_a_model_on_the_next_loader_with_a_note(plant, words, start):
    faulty = Faulty(plant)
    engine = start(faulty, TransformersLoader())
    seen = []
    engine.slot.watchers.append(lambda status: seen.append(status.text))
    loaded = engine.load("tiny")
    assert engine.choice.loader.name == "transformers" and answer(engine)[1].new_tokens == 4
    assert any("Trying transformers instead" in text for text in seen)
    notes = [note for note in loaded.notes if "faulty failed" in note]
    assert len(notes) == 1 and words in notes[0] and faulty.held == []


def test_what_failed_is_remembered_in_the_next_run(start):
    faulty = Faulty(failing_import)
    start(faulty, TransformersLoader()).load("tiny")
    again = start(faulty, TransformersLoader())
    again.load("tiny")
    assert faulty.loads == 1 and "faulty failed here before" in again.choice.reason
    first, second = again.planner.survey(again.loaded.model)  # each row of the table has its own
    assert first.note.startswith("failed here before") and not first.reason and second.reason == TransformersLoader.reason


@pytest.mark.parametrize(("plant", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_without_another_loader_ends_in_an_empty_usable_engine_and_a_sentence(plant, words, start):
    faulty = Faulty(plant)
    engine, before = start(faulty), workers()
    with pytest.raises(LoadFailed, match=words) as caught:
        engine.load("tiny")
    assert engine.loaded is None and engine.status.error and engine.status.text == str(caught.value)
    assert "Traceback" not in str(caught.value)
    caught = None
    engine.recovery.last_error = ""
    assert faulty.held == []
    assert workers() <= before
    faulty.plant = lambda loaded: None
    engine.load("tiny")
    assert answer(engine)[1].new_tokens == 4


@pytest.mark.parametrize("plant", [failing_import, memory_in_a_layer])
def test_a_loader_that_the_user_chose_is_never_replaced(plant, start):
    engine = start(Faulty(plant), TransformersLoader())
    with pytest.raises(LoadFailed):
        engine.load("tiny", "faulty")
    assert engine.loaded is None
    engine.settings.save_for_model("tiny", loader="faulty")
    with pytest.raises(LoadFailed):
        engine.load("tiny")
    assert engine.loaded is None


def test_gibberish_from_a_loader_that_the_user_chose_is_kept_with_a_note(start):
    engine = start(Faulty(not_numbers), TransformersLoader())
    loaded = engine.load("tiny", "faulty")
    assert engine.choice.loader.name == "faulty" and any("NaN" in note for note in loaded.notes)


def test_one_token_for_ever_is_gibberish_where_another_loader_can_and_a_note_where_none_can(start):
    engine = start(Faulty(one_token), TransformersLoader())
    engine.load("tiny")
    assert engine.choice.loader.name == "transformers"
    alone = start(Faulty(one_token))
    assert any("again and again" in note for note in alone.load("tiny").notes)


def test_a_chosen_loader_that_works_again_is_no_longer_remembered_as_failing(start):
    faulty = Faulty(failing_import)
    engine = start(faulty, TransformersLoader())
    engine.load("tiny")
    faulty.plant = lambda loaded: None
    engine.load("tiny", "faulty")
    engine.load("tiny")
    assert engine.choice.loader.name == "faulty"


def test_damaged_files_are_not_given_to_a_loader_that_may_be_silent_about_them(start):
    def damaged(_loaded):
        raise BadCheckpoint("The files of tiny lack 3 tensors.")

    engine = start(Faulty(damaged), TransformersLoader())
    with pytest.raises(BadCheckpoint, match="lack 3 tensors"):
        engine.load("tiny")


def test_only_one_other_loader_is_tried(start):
    third = Faulty(lambda loaded: None)
    third.name = "third"
    second = Faulty(failing_kernel)
    second.name = "second"
    engine = start(Faulty(failing_import), second, third)
    with pytest.raises(LoadFailed, match=r"(?s)faulty: .*CUDA_HOME.*second: .*illegal instruction"):
        engine.load("tiny")
    assert third.loads == 0


def test_memory_that_was_lacking_is_tried_again_when_more_is_free(start, monkeypatch):
    faulty = Faulty(memory_in_a_layer)
    engine = start(faulty, TransformersLoader())
    engine.load("tiny")
    faulty.plant = lambda loaded: None
    monkeypatch.setattr("gptq_webui.engine.available_memory.free_bytes", lambda *_: 1 << 50)
    engine.load("tiny")
    assert engine.choice.loader.name == "faulty"


def test_a_load_can_be_stopped_and_the_model_before_is_one_call_away(start, folder):
    engine = start(TransformersLoader())
    engine.load("tiny", options={"context_tokens": 100})
    engine.loaders.insert(0, Faulty(lambda loaded: engine.cancel_load()))
    with pytest.raises(LoadCancelled, match="was stopped"):
        engine.load("tiny")
    assert engine.loaded is None and not engine.status.error and "was stopped" in engine.status.text
    assert engine.loaders[0].held == []
    del engine.loaders[0]
    assert engine.load_previous().context_tokens == 100 and engine.slot.previous is None


def test_a_stop_is_heard_while_weights_are_read(start, monkeypatch):
    from gptq_webui.gptq import load_progress

    monkeypatch.setattr(load_progress, "_LOOK_S", 0.005)
    setting = torch.nn.Module.__setattr__

    def slow(self, name, value):
        if isinstance(value, torch.nn.Parameter) and not value.is_meta:
            time.sleep(0.05)  # 26 tensors and more: over a second
            if not engine.slot._cancel.is_set():
                engine.cancel_load()
        setting(self, name, value)

    engine = start(TransformersLoader())
    monkeypatch.setattr(torch.nn.Module, "__setattr__", slow)
    began = time.monotonic()
    with pytest.raises(LoadCancelled):
        engine.load("tiny")
    assert time.monotonic() - began < 5 and engine.loaded is None


def test_memory_that_runs_out_in_an_answer_leaves_the_process_the_model_and_three_remedies(start):
    engine = start(TransformersLoader())
    loaded = engine.load("tiny")
    memory_in_a_layer(loaded)
    with pytest.raises(AnswerFailed, match="not enough memory"):
        answer(engine)
    assert [each.kind for each in engine.recovery.trouble.remedies] == ["context", "cache", "branch"]
    assert engine.recovery.trouble.remedies[1].cannot and "out of memory" in engine.recovery.last_error
    del loaded.hf.model.layers[1].mlp.forward
    assert answer(engine)[1].new_tokens == 4


def test_a_worker_killed_in_an_answer_is_a_sentence_and_a_way_back(start):
    engine = start(TransformersLoader())
    dead_thread(engine.load("tiny"))
    with pytest.raises(AnswerFailed, match="thread ended because of an error"):
        answer(engine)
    with pytest.raises(AnswerFailed, match="its memory is free"):
        answer(engine)
    assert engine.loaded is None and engine.status.error
    engine.load_previous()
    assert answer(engine)[1].new_tokens == 4


def test_a_smaller_context_is_loaded_and_saved(start):
    engine = start(Faulty(memory_in_a_layer))
    with pytest.raises(NotEnoughMemory):
        engine.load("tiny", options={"context_tokens": 2048, "alpha_value": 8})  # it was trained for 256
    smaller = engine.recovery.trouble.remedies[0]
    assert smaller.label == "Smaller context (1024 tokens)"
    engine.loaders[0].plant = lambda loaded: None
    engine.apply(smaller)
    assert engine.recovery.trouble is None and engine.settings.for_model("tiny")["options"] == {"context_tokens": 1024}


def test_what_cannot_fit_anywhere_is_refused_before_the_loaded_model_is_touched(start, folder, monkeypatch):
    engine = start(TransformersLoader())
    loaded = engine.load("tiny")
    huge = LocalModel.read(folder)
    huge = LocalModel(huge.folder, huge.kind, huge.quantize, 10**15, 256, huge.architecture, huge.weights)
    with pytest.raises(GptqWebuiError, match="does not fit"):
        engine.load_folder(huge)
    assert engine.loaded is loaded and answer(engine)[1].new_tokens == 4


def test_an_unused_model_is_unloaded_and_comes_back_for_everybody_who_waits(start):
    engine = start(TransformersLoader())
    engine.load("tiny", options={"context_tokens": 100})
    engine.set_idle_minutes(0.002)
    deadline = time.monotonic() + 10
    while engine.loaded is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    while engine.status.phase != "empty" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.loaded is None and "without use" in engine.status.text and not engine.status.error
    engine.set_idle_minutes(0)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(answer(engine)[1].new_tokens)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [4, 4, 4] and engine.loaded.context_tokens == 100


def test_freeing_the_memory_ends_an_answer(start):
    engine = start(TransformersLoader())
    engine.load("tiny")
    weights = [weakref.ref(parameter) for parameter in engine.loaded.hf.parameters()]
    stream = engine.chat(HELLO, GenerationParams(max_new_tokens=5000), threading.Event())
    next(stream)
    engine.free()
    assert [event.reason for event in stream if isinstance(event, Finish)] == ["cancelled"]
    gc.collect()
    assert engine.loaded is None and [each for each in weights if each() is not None] == []
