"""loaders/pretrained/hf_queue.py: a program that calls the transformers model itself stands in the same line."""

import functools
import threading
import time

import pytest
import torch

import tiny
from gptq_webui.core.chat import Message, Step
from gptq_webui.core.errors import Busy
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import stepper_choice
from gptq_webui.gptq.transformers_stepper import TransformersStepper
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

IDS = torch.tensor([[0, 50, 51, 52]])


@pytest.fixture
def model(tmp_path):
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", "{{ bos_token }}" + CHATML)
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(device="cpu"), lambda *_: None)
    yield loaded
    loaded.close()


def generate(model, count=8, **kwargs):
    return model.hf.generate(IDS, max_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0, **kwargs)


def test_every_forward_runs_on_the_models_own_thread(model):
    seen = set()
    model.hf.model.register_forward_hook(lambda *_: seen.add(threading.current_thread().name))
    generate(model)
    with torch.no_grad():
        model.hf(IDS)
    list(model.chat([Message("user", "Hi")], GenerationParams(max_new_tokens=3), threading.Event()))
    assert seen == {"gptq-webui model"}


def test_two_callers_at_once_each_get_their_own_answer(model):
    alone = generate(model).tolist()
    text = list(model.generate(IDS[0].tolist(), GenerationParams(temperature=0), threading.Event()))
    found = []
    threads = [threading.Thread(target=lambda: found.append(generate(model).tolist())) for _ in range(3)]
    for thread in threads:
        thread.start()
    again = list(model.generate(IDS[0].tolist(), GenerationParams(temperature=0), threading.Event()))
    for thread in threads:
        thread.join()
    assert found == [alone] * 3 and [each.id for each in again[:-1]] == [each.id for each in text[:-1]]


def test_what_the_callers_own_criteria_raise_reaches_the_caller(model):
    class Stop(Exception):
        pass

    def criteria(ids, scores, **_):
        raise Stop

    with pytest.raises(Stop):
        generate(model, stopping_criteria=[criteria])
    assert generate(model).shape[1] == 12  # and the thread lives


def test_the_callers_gradient_mode_is_kept(model):
    with torch.no_grad():
        assert not model.hf(IDS).logits.requires_grad


def test_closing_ends_a_callers_generation_and_waits_for_it(model):
    begun = threading.Event()
    found = []

    def criteria(ids, scores, **_):
        begun.set()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    thread = threading.Thread(target=lambda: found.append(generate(model, 200, stopping_criteria=[criteria])))
    thread.start()
    begun.wait(10)
    model.close()
    thread.join(10)
    assert 4 < found[0].shape[1] < 200


def test_closing_gives_the_model_back_and_refuses_late_callers(model):
    hf = model.hf
    late = hf.generate
    model.close()
    assert "generate" not in vars(hf) and "forward" not in vars(hf)
    with pytest.raises(Busy, match="unloaded"):
        late(IDS)


# a step that computes several answers at once


class Slotted(TransformersStepper):
    """Computes as transformers does; says that three answers may be under way, and looks who is."""

    parallel = 3

    def __init__(self, hf):
        super().__init__(hf)
        self.begun, self.most, self.modes = 0, 0, set()
        self.chunk_tokens = 2
        usual = hf.generate

        def generate(*args, **kwargs):
            assert self.begun == 0
            self.begun = 100  # an answer that began now would be seen
            time.sleep(0.01)
            try:
                return usual(*args, **kwargs)
            finally:
                assert self.begun == 100
                self.begun = 0

        hf.generate = generate

    def answer(self, *args):
        self.begun += 1
        self.most = max(self.most, self.begun)
        try:
            for step in super().answer(*args):
                self.modes.add(torch.is_inference_mode_enabled())
                assert self.begun <= self.parallel
                yield step
        finally:
            self.begun -= 1


@pytest.fixture
def slotted(tmp_path, monkeypatch):
    monkeypatch.setattr(stepper_choice, "stepper_for", lambda hf, context, **_: (Slotted(hf), ""))
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", "{{ bos_token }}" + CHATML)
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(device="cpu"), lambda *_: None)
    loaded._end_ids = set()
    yield loaded
    loaded.close()


PROMPTS = [[0, 50, 51, 52, 60 + at] for at in range(6)]
GREEDY = GenerationParams(temperature=0, max_new_tokens=20)


def ids_of(stream):
    return [each.id for each in stream if isinstance(each, Step)]


def test_the_loaded_model_offers_as_many_answers_at_once_as_its_step(slotted):
    assert slotted.parallel == slotted._worker.parallel == 3


def test_the_processor_offers_several_answers_at_once_with_its_own_step_only(model):
    assert model.parallel == model._worker.parallel
    assert 8 <= model.parallel <= 64 if model.kernel == "cpu" else model.parallel == 1


def test_answers_side_by_side_are_those_of_each_alone(slotted):
    alone = [ids_of(slotted.generate(prompt, GREEDY, threading.Event())) for prompt in PROMPTS]
    assert slotted._stepper.most == 1
    streams = [slotted.generate(prompt, GREEDY, threading.Event()) for prompt in PROMPTS]
    assert [ids_of(each) for each in streams] == alone
    assert slotted._stepper.most > 1 and slotted._stepper.modes == {True}


def test_a_caller_from_outside_is_never_computed_beside_answers_and_neither_waits_for_ever(slotted):
    prompt = torch.tensor([PROMPTS[0]])
    expected = ids_of(slotted.generate(PROMPTS[0], GREEDY, threading.Event()))
    found, failed = [], []

    def outside():
        try:
            for _ in range(4):
                answer = slotted.hf.generate(
                    prompt, max_new_tokens=20, do_sample=False, eos_token_id=[], pad_token_id=0, repetition_penalty=1.1
                )
                found.append(answer[0, prompt.shape[1] :].tolist())
                with torch.enable_grad():
                    assert not torch.is_inference_mode_enabled()
                    slotted.hf(prompt)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=outside) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        streams = [slotted.generate(each, GREEDY, threading.Event()) for each in PROMPTS]
        assert ids_of(streams[0]) == expected and all(len(ids_of(each)) == 20 for each in streams[1:])
    for thread in threads:
        thread.join(30)
    assert failed == [] and found == [expected] * 8
    assert slotted._stepper.most > 1


def test_an_answer_that_is_held_to_a_form_is_computed_alone(slotted):
    held = GenerationParams(max_new_tokens=5)
    assert not slotted._is_alone(held)
    object.__setattr__(held, "grammar", "some")
    assert slotted._is_alone(held)


def test_one_thread_is_left_in_no_mode_between_the_turns_of_answers(slotted):
    modes = set()

    def look():
        for _ in range(30):
            modes.add(torch.is_inference_mode_enabled())
            yield None

    streams = [slotted.generate(prompt, GREEDY, threading.Event()) for prompt in PROMPTS[:2]]
    list(slotted._worker.stream(look, threading.Event(), None))
    assert all(len(ids_of(each)) == 20 for each in streams) and modes == {False}


def test_generate_in_the_queue_goes_from_token_to_token_by_our_own_loop(model, monkeypatch):
    pytest.importorskip("numba")
    from gptq_webui.gptq.sampling_loop import SamplingLoop

    runs, run = [], SamplingLoop.run
    monkeypatch.setattr(SamplingLoop, "run", lambda self, *given: runs.append(1) or run(self, *given))
    generate(model)
    assert runs == [1]
    before = model.hf.forward
    model.hf.forward = functools.wraps(before)(lambda *args, **kwargs: before(*args, **kwargs))  # of another program
    generate(model)
    assert runs == [1]
    model.hf.forward = before
    generate(model)
    assert runs == [1, 1]
