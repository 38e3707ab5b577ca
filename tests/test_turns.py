"""loaders/turns.py: a program that calls the transformers model itself stands in the same line."""

import threading

import pytest
import torch

import tiny
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import Busy
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.built_in_templates import CHATML
from gptq_webui.loaders.transformers import TransformersLoader, TransformersOptions

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
