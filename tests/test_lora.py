"""LoRA adapters over packed layers, against the dequantised twin with the adapter added to its weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, lora
from gptq_webui.gptq.cpu import numba_compiler
from gptq_webui.hub import adapter_base
from gptq_webui.loaders.pretrained import adapters

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
        ({"peft_type": "IA3"}, "^adapter is not a LoRA adapter"),
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
    with pytest.raises(BadParameter, match="There is no folder nowhere for the LoRA adapter"):
        load("nowhere")


def hostile(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> None:
    """An adapter for one layer, with other settings or other tensors."""
    folder.mkdir(exist_ok=True)
    held = {"lora_A": torch.ones(4, 64), "lora_B": torch.ones(64, 4)} | tensors
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.{key}.weight": each for key, each in held.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.write(folder)
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")[0]


@pytest.mark.parametrize(
    "config",
    (
        {"lora_alpha": "much"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": float("nan")},
        {"lora_alpha": [8]},
        {"lora_alpha": True},
        {"lora_alpha": 10**30},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"(x+x+)+y": 2}},
        {"alpha_pattern": {"(": 2}},
        {"alpha_pattern": {"[": 2}},
        {"alpha_pattern": {".*.*.*.*.*q": 2}},
        {"alpha_pattern": {"q" * 500 + "[a]": 2}},
        {"alpha_pattern": {f"[a]{at}": 2 for at in range(200)}},
    ),
    ids=lambda config: str(config)[:50],
)
def test_settings_of_an_adapter_that_cannot_be_used_are_a_sentence(base, tmp_path, config):
    hostile(tmp_path / "a", config)
    with pytest.raises(BadCheckpoint, match=r"The adapter_config.json of a cannot be used: .* Correct it, or choose another"):
        lora.read(base, tmp_path / "a")


@pytest.mark.parametrize(
    ("tensors", "says"),
    (
        ({"lora_A": torch.ones(4, 64), "lora_B": torch.ones(64, 5)}, "does not fit"),
        ({"lora_A": torch.ones(0, 64), "lora_B": torch.ones(64, 0)}, "does not fit"),
        ({"lora_A": torch.ones(65, 64), "lora_B": torch.ones(64, 65)}, "does not fit"),
        ({"lora_A": torch.ones(64)}, "does not fit"),
        ({"lora_B": torch.ones(64, 4, 1)}, "does not fit"),
        ({"lora_A": torch.ones(4, 64).int()}, "no numbers to multiply with"),
        ({"lora_B": torch.full((64, 4), torch.inf)}, "no numbers to multiply with"),
        ({"lora_B": torch.full((64, 4), torch.nan).bfloat16()}, "no numbers to multiply with"),
        ({"lora_bias": torch.ones(4)}, "which is no part of LoRA"),
    ),
    ids=range(9),
)
def test_tensors_of_an_adapter_that_cannot_be_used_are_a_sentence(base, tmp_path, tensors, says):
    hostile(tmp_path / "a", **tensors)
    with pytest.raises(BadCheckpoint, match=says):
        lora.read(base, tmp_path / "a")


def test_a_rank_that_would_fill_the_memory_is_refused_before_it_is_read(base, tmp_path):
    """A sparse file: 4 TB by its header, some bytes on the disk."""
    hostile(tmp_path / "a")
    name, rank = "base_model.model.model.layers.0.self_attn.q_proj", 2**33
    half = rank * 64 * 4
    header = {
        f"{name}.lora_A.weight": {"dtype": "F32", "shape": [rank, 64], "data_offsets": [0, half]},
        f"{name}.lora_B.weight": {"dtype": "F32", "shape": [64, rank], "data_offsets": [half, 2 * half]},
    }
    head = json.dumps(header).encode()
    with (tmp_path / "a" / "adapter_model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + 2 * half)
    with pytest.raises(BadCheckpoint, match="does not fit"):
        lora.read(base, tmp_path / "a")


def test_weights_that_are_no_file_of_weights_are_a_sentence(base, tmp_path):
    hostile(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", file.read_bytes()[:-9]):
        file.write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"(?i)download|git lfs"):
            lora.read(base, tmp_path / "a")


def test_numbers_of_eight_bits_are_read_as_what_they_are(base, tmp_path):
    hostile(
        tmp_path / "a", lora_A=torch.full((4, 64), 0.5).to(torch.float8_e4m3fn), lora_B=torch.ones(64, 4).to(torch.float8_e5m2)
    )
    [(_module, inner, outer)] = lora.read(base, tmp_path / "a").values()
    assert torch.equal(inner, torch.full((4, 64), 0.5)) and torch.equal(outer, torch.full((64, 4), 2.0))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{", b"[]", b"\xff", b'{"peft_type": "LORA", "x": "' + b"y" * 1_000_001 + b'"}']
)
def test_settings_that_cannot_be_read_are_a_sentence(base, tmp_path, text):
    hostile(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(text)
    with pytest.raises(BadCheckpoint, match=r"adapter_config.json (is|holds) .*Download it again"):
        lora.read(base, tmp_path / "a")
    assert adapter_base.beside(tmp_path / "model") == {"a": adapter_base.AdapterFacts("", 0)}


def test_adapters_that_would_fill_the_memory_are_refused_and_a_link_to_nothing_is_no_harm(base, tmp_path, monkeypatch):
    class Stepper:
        def adapter(self, parts):
            return parts

    (tmp_path / "model").mkdir()
    hostile(tmp_path / "a")
    (tmp_path / "a" / "adapter_old.safetensors").symlink_to(tmp_path / "nothing")
    found = adapters.Adapters(SimpleNamespace(folder=tmp_path / "model", name="model"), base, Stepper())
    monkeypatch.setattr(adapters, "available_ram_bytes", lambda: 1000)
    with pytest.raises(BadParameter, match=r"The adapters need .* of memory.*1.0 KB are free"):
        found.of((("a", 1.0),))
    monkeypatch.undo()
    assert len(found.of((("a", 1.0),))) == 1
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to(tmp_path / "nothing")
    with pytest.raises(BadParameter, match=r"^a is not a LoRA adapter"):
        found.of((("a", 1.0),))


@pytest.mark.parametrize(("rank", "shown"), [(8, 8), (True, 0), (-1, 0), (10**4000, 0), (1.5, 0), ("8", 0), (None, 0)])
def test_a_rank_that_no_layer_has_is_not_shown(rank, shown):
    assert adapter_base.facts_of({"r": rank}).rank == shown


def test_names_and_quick_patterns_choose_the_alpha(base, tmp_path):
    """As PEFT reads them: the end of a layer's name."""
    for pattern, alpha in {
        "q_proj": 3, "self_attn.q_proj": 3, r"layers\.0\.self_attn\.q_proj": 3, "^model.layers.0.self_attn.q_proj$": 3,
        r".*\.self_attn\.q_proj": 3, r"layers.\d+.self_attn.[qv]_proj": 3, "proj": 8, "k_proj": 8, "layers.1.self_attn.q_proj": 8,
    }.items():  # fmt: skip
        hostile(tmp_path / "a", {"alpha_pattern": {pattern: 3}})
        (_module, _inner, outer) = lora.read(base, tmp_path / "a")["model.layers.0.self_attn.q_proj"]
        assert float(outer[0, 0]) == alpha / 4, pattern


@pytest.mark.parametrize(
    ("config", "says"),
    (
        *(({"init_lora_weights": each}, "beside weights .* PEFT had changed") for each in ("pissa_niter_16", "OLoRA", "corda")),
        ({"alora_invocation_tokens": [5, 6]}, "at certain tokens only"),
    ),
)
def test_an_adapter_for_other_weights_or_some_tokens_is_a_sentence(base, tmp_path, config, says):
    hostile(tmp_path / "a", config)
    with pytest.raises(BadCheckpoint, match=rf"The adapter a .*{says}.*hoose another adapter"):
        lora.read(base, tmp_path / "a")


def test_settings_without_an_alpha_have_that_of_peft(base, tmp_path):
    hostile(tmp_path / "a", {"init_lora_weights": "gaussian"})
    eight = lora.read(base, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    none = lora.read(base, tmp_path / "a")
    assert all(torch.equal(none[name][2], eight[name][2]) for name in eight)
