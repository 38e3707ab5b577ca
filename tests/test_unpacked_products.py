"""gptq/unpacked_products.py: where nothing can be compiled, packed layers multiply with their dense weights."""

from types import SimpleNamespace

import pytest
import torch

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, stepper_choice, unpacked_products
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.unpacked_products import hold_dense

IDS = torch.tensor([[5, 9, 200, 7, 33, 8, 100, 6]])


def load(folder, kind="llama", dtype=torch.float32, **settings):
    twin = tiny.write(folder, kind, **settings)
    model, _notes = checkpoint.load(LocalModel.read(folder), dtype=dtype, device_map="cpu")
    return model, twin


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "mixtral"])
def test_a_model_computes_what_its_twin_does_and_holds_its_weights_once(kind, tmp_path):
    model, twin = load(tmp_path, kind)
    assert hold_dense(model)
    with torch.inference_mode():
        found, wanted = model(IDS).logits, twin(IDS).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    layers = [each for each in model.modules() if isinstance(each, GPTQLinear)]
    assert layers and not any(each.qweight.numel() for each in layers)


def test_what_does_not_fit_stays_packed(tmp_path, monkeypatch):
    model, _twin = load(tmp_path)
    size = sum(4 * each.in_features * each.out_features for each in model.modules() if isinstance(each, GPTQLinear))
    monkeypatch.setattr(unpacked_products.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(size * 1.29)))
    assert not hold_dense(model)
    assert all(each.qweight.numel() for each in model.modules() if isinstance(each, GPTQLinear))
    monkeypatch.setattr(unpacked_products.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(size * 1.31)))
    assert hold_dense(model)


def test_a_model_of_shorter_numbers_stays_packed(tmp_path):
    assert not hold_dense(load(tmp_path, dtype=torch.bfloat16)[0])


def test_a_model_without_numba_is_held_so_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(stepper_choice.numba_compiler, "available", lambda: False)
    model, twin = load(tmp_path)
    stepper, note = stepper_choice.stepper_for(model, 64)
    assert stepper.kernel == "transformers" and "pip install numba" in note
    assert not any(each.qweight.numel() for each in model.modules() if isinstance(each, GPTQLinear))
    with torch.inference_mode():
        found = stepper.prefill(stepper.begin(), IDS[0].tolist())
        assert (found[0] - twin(IDS).logits[0, -1]).norm() / found.norm() < 1e-4
