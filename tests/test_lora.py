"""LoRA adapters over packed layers, against the dequantised twin with the adapter added to its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, lora
from gptq_webui.gptq.cpu import numba_compiler

IDS = torch.arange(4, 44)[None]


def write_adapter(
    folder: Path,
    model: torch.nn.Module,
    names: tuple[str, ...],
    rank: int = 4,
    *,
    seed: int = 1,
    size: float = 0.2,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A random adapter as PEFT writes it; returns B A [N, K] of each layer, without the scale."""
    generator = torch.Generator().manual_seed(seed)
    tensors, products = {}, {}
    for name, module in model.named_modules():
        if name.endswith(names):
            out, inputs = module.weight.shape
            a, b = (torch.randn(shape, generator=generator) * size for shape in ((rank, inputs), (out, rank)))
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            products[name] = b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": list(names), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return products


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("changes", "scales"),
    (
        ({}, {"q_proj": 2.0, "down_proj": 2.0}),
        ({"use_rslora": True}, {"q_proj": 4.0, "down_proj": 4.0}),
        ({"alpha_pattern": {"down_proj": 2}}, {"q_proj": 2.0, "down_proj": 0.5}),
    ),
)
@pytest.mark.parametrize("compiled", (False, True))
def test_logits_are_those_of_the_twin_with_merged_weights(
    compiled: bool, changes: dict[str, Any], scales: dict[str, float], tmp_path: Path
) -> None:
    twin = tiny.write(tmp_path / "packed")
    products = write_adapter(tmp_path / "adapter", twin, ("q_proj", "down_proj"), **changes)
    model, _ = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float32, device_map="cpu")
    if compiled:
        cpu_linear = pytest.importorskip("gptq_webui.gptq.cpu.cpu_linear")
        assert cpu_linear.replace_layers(model, 1) == 14
    without = logits(model)
    assert lora.attach(model, tmp_path / "adapter") == 4
    for name, product in products.items():
        twin.get_submodule(name).weight.data += scales[name.rpartition(".")[2]] * product
    expected = logits(twin)
    assert (expected - without).abs().max() > 0.05
    tolerance = 1e-3 if not compiled else 0.03 * float(expected.abs().max())  # the compiled layer rounds its inputs to 8 bits
    assert (logits(model) - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"use_dora": True}, "more than LoRA does"),
        ({"bias": "all"}, "more than LoRA does"),
        ({"peft_type": "IA3"}, "is not a LoRA adapter"),
    ),
)
def test_other_kinds_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    twin = tiny.dense_model("llama")
    write_adapter(tmp_path / "adapter", twin, ("q_proj",), **changes)
    before = logits(twin)
    with pytest.raises(BadCheckpoint, match=words):
        lora.attach(twin, tmp_path / "adapter")
    assert torch.equal(logits(twin), before)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny.dense_model("gpt_neox"), ("dense_h_to_4h",))
    with pytest.raises(BadCheckpoint, match="for another base model"):
        lora.attach(tiny.dense_model("llama"), tmp_path / "adapter")


def test_a_loader_adds_it_and_says_so(tmp_path: Path) -> None:
    from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

    twin = tiny.write(tmp_path / "packed")
    tiny.write_tokenizer(tmp_path / "packed")
    for name, product in write_adapter(tmp_path / "adapter", twin, ("q_proj", "down_proj")).items():
        twin.get_submodule(name).weight.data += 2 * product

    def load(lora: str) -> Any:
        return TransformersLoader().load(
            LocalModel.read(tmp_path / "packed"), TransformersOptions(lora=lora, device="cpu"), lambda share, text: None
        )

    loaded = load("adapter")
    expected = logits(twin)
    assert (logits(loaded.hf) - expected).abs().max() < 0.03 * expected.abs().max()
    said = "a LoRA adapter is added to single layers" if numba_compiler.available() else "with numba"
    assert any(said in each for each in loaded.notes)
    loaded.close()
    with pytest.raises(BadParameter, match=r"There is no folder .*nowhere for the LoRA adapter"):
        load("nowhere")
