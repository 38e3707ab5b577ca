"""PEFT over packed layers (gptq/peft_patch.py). PEFT is not among this project's packages: without it these tests are skipped."""

from pathlib import Path

import pytest
import torch
from test_lora import IDS, logits, write_adapter

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, lora, peft_patch

peft = pytest.importorskip("peft", reason="pip install peft")


@pytest.fixture
def twin(tmp_path):
    peft_patch.install()
    twin = tiny.write(tmp_path / "packed")
    write_adapter(tmp_path / "adapter", twin, ("q_proj", "down_proj"))
    return twin


def packed(folder: Path) -> torch.nn.Module:
    return checkpoint.load(LocalModel.read(folder / "packed"), dtype=torch.float32, device_map="cpu")[0]


def test_an_adapter_gives_the_logits_of_the_dequantised_twin(twin, tmp_path):
    expected = logits(peft.PeftModel.from_pretrained(twin, tmp_path / "adapter"))
    assert (logits(peft.PeftModel.from_pretrained(packed(tmp_path), tmp_path / "adapter")) - expected).abs().max() < 1e-3
    ours = packed(tmp_path)
    lora.attach(ours, tmp_path / "adapter")
    assert (logits(ours) - expected).abs().max() < 1e-3


def test_an_adapter_is_trained_over_packed_weights(twin, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(packed(tmp_path), config)
    assert model.base_model.hf_quantizer.is_trainable  # transformers' Trainer asks
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05 and len(trained) == 8
    model.save_pretrained(tmp_path / "made")
    ours = packed(tmp_path)
    assert lora.attach(ours, tmp_path / "made") == 4
    assert (logits(ours) - logits(model)).abs().max() < 1e-3


def test_all_linear_layers_are_the_packed_ones_too(twin, tmp_path):
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ours = peft.get_peft_model(packed(tmp_path), peft.LoraConfig(**config))
    theirs = peft.get_peft_model(twin, peft.LoraConfig(**config))
    found, wanted = ({name for name, each in model.named_parameters() if each.requires_grad} for model in (ours, theirs))
    assert found == wanted and len(found) == 2 * 2 * 7
