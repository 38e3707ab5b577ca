"""Making GPTQ models: the algorithm on small matrices, the files on small models."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gptq_webui.core.errors import LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.gptq import bit_packing, gptq_solver, quantize
from gptq_webui.gptq.gptq_solver import Packed, quantize_linear
from gptq_webui.gptq.quantize import quantize_model

K, N = 192, 64
ACT_ORDER_4 = QuantizeConfig(4, 32, desc_act=True)


def correlated(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] and the Hessian [K, K] of inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(K, K, generator=generator) * 0.3 + torch.eye(K)
    x = torch.randn(2000, K, generator=generator) @ mixed * torch.linspace(0.2, 3, K)[torch.randperm(K, generator=generator)]
    return torch.randn(N, K, generator=generator) * 0.05, x.T @ x


def dense(packed: Packed, config: QuantizeConfig) -> torch.Tensor:
    """[N, K] in fp64."""
    parts = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
    return bit_packing.dequantize(*parts, config.bits, config.checkpoint_format, torch.float64).T


def output_error(weight: torch.Tensor, hessian: torch.Tensor, packed: Packed, config: QuantizeConfig) -> float:
    """|W x - Ŵ x|² over the calibration text, as a share of |W x|²."""
    wrong = dense(packed, config) - weight.double()
    size = weight.double() @ hessian.double() * weight.double()
    return float((wrong @ hessian.double() * wrong).sum() / size.sum())


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("act_order", (False, True))
def test_feeding_the_error_back_beats_plain_rounding(bits: int, act_order: bool) -> None:
    weight, hessian = correlated()
    config = QuantizeConfig(bits, 32, desc_act=act_order, damp_percent=0.01)
    plain = quantize_linear(weight, torch.eye(K), config)  # independent inputs: there is nothing to feed back
    found = output_error(weight, hessian, quantize_linear(weight, hessian, config), config)
    assert found < 0.8 * output_error(weight, hessian, plain, config)


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order", "sym", "checkpoint_format"),
    list(itertools.product((2, 3, 4, 8), (-1, 32, 128), (False, True), (False, True), ("gptq", "gptq_v2"))),
)
def test_plain_rounding_errs_by_half_a_step_at_most(
    bits: int, group_size: int, act_order: bool, sym: bool, checkpoint_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With independent inputs, weights that are not cut off, in every layout; 192 rows leave a short group of 128."""
    monkeypatch.setattr(gptq_solver, "_LOW_BITS", 0)
    weight, _ = correlated()
    config = QuantizeConfig(bits, group_size, act_order, sym, checkpoint_format)
    packed = quantize_linear(weight, torch.diag(torch.rand(K) + 0.5), config)
    step = packed.scales.double()[packed.g_idx.long()].T  # [N, K]
    wrong = (dense(packed, config) - weight.double()).abs()
    if sym:  # half a step, and what the scale's own rounding to fp16 moves a number 128 steps from the middle
        assert (wrong <= step * 0.57).all()
    else:  # the zero is rounded too: the ends of a group may err by a whole step
        assert (wrong <= step * 1.1).all() and wrong.median() < step.median() / 2
    groups = bit_packing.group_count(K, group_size)
    assert packed.scales.shape == (groups, N) and packed.scales.dtype == torch.float16
    assert packed.qweight.shape == (K * bits // 32, N) and packed.qzeros.shape == (groups, N * bits // 32)
    assert packed.qweight.dtype == packed.qzeros.dtype == packed.g_idx.dtype == torch.int32


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("sym", (False, True))
def test_few_bits_are_spent_with_care(bits: int, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = correlated()
    config = QuantizeConfig(bits, 32, sym=sym)
    chosen = quantize_linear(weight, torch.eye(K), config)
    monkeypatch.setattr(gptq_solver, "_LOW_BITS", 0)
    whole_range = quantize_linear(weight, torch.eye(K), config)
    assert output_error(weight, torch.eye(K), chosen, config) < 0.95 * output_error(weight, torch.eye(K), whole_range, config)


def test_a_scale_serves_the_rows_whose_errors_cost_most() -> None:
    """One of 32 weights is four times as large as the others: it is cut off only where hardly anything is read through it."""
    weight = torch.linspace(-1, 1, 32)[None].clone()
    weight[0, 0] = -4.0
    seldom, always = torch.ones(32), torch.ones(32)
    seldom[0] = 1e-3
    config = QuantizeConfig(4, 32, damp_percent=0.0001)
    scales = [float(quantize_linear(weight, torch.diag(each), config).scales[0, 0]) for each in (seldom, always)]
    assert scales[0] == pytest.approx(0.7 * 0.5, rel=1e-3) and scales[1] >= 0.95 * 0.5


def test_act_order_forms_groups_by_falling_diagonal() -> None:
    weight, hessian = correlated()
    packed = quantize_linear(weight, hessian, ACT_ORDER_4)
    assert not bit_packing.g_idx_is_sorted(packed.g_idx)
    assert packed.g_idx.bincount().tolist() == [32] * 6
    ranks = hessian.diagonal().argsort(descending=True)
    assert bit_packing.g_idx_is_sorted(packed.g_idx[ranks])


def test_without_act_order_g_idx_is_the_default() -> None:
    weight, hessian = correlated()
    packed = quantize_linear(weight, hessian, QuantizeConfig(4, 32, desc_act=False))
    assert torch.equal(packed.g_idx, bit_packing.default_g_idx(K, 32))


def test_symmetric_zeros_are_written_as_autogptq_does() -> None:
    weight, hessian = correlated()
    assert (quantize_linear(weight, hessian, ACT_ORDER_4).qzeros == 0x77777777).all()


def test_an_asymmetric_file_of_format_gptq_has_no_zero_of_0() -> None:
    """Its stored form would be 2^bits - 1, which some readers take for 2^bits."""
    config = QuantizeConfig(4, 32, sym=False)
    packed = quantize_linear(correlated()[0].abs() + 0.01, torch.eye(K), config)
    assert bit_packing.true_zeros(packed.qzeros, 4, N, "gptq").min() == 1


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, hessian = correlated()
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 64:96] = 0  # a group of zeros
    for config in (ACT_ORDER_4, QuantizeConfig(4, 32, sym=False)):
        found = dense(quantize_linear(weight, hessian, config), config)
        assert found.isfinite().all()
        assert (found[:, 5] == 0).all()


def test_statistics_that_are_no_numbers_are_an_error_in_words() -> None:
    weight, hessian = correlated()
    hessian[3, 3] = float("nan")
    with pytest.raises(LoadFailed, match="no usable statistics"):
        quantize_linear(weight, hessian, ACT_ORDER_4)


def test_configurations_solved_together_are_the_same_as_alone() -> None:
    weight, hessian = correlated()
    configs = [ACT_ORDER_4, QuantizeConfig(8, 64, desc_act=True), QuantizeConfig(3, -1, desc_act=False, damp_percent=0.1)]
    together = gptq_solver.solve([weight.T[:, :32], weight.T[:, 32:]], hessian, configs)
    for config, pieces in zip(configs, together, strict=True):
        alone = dense(quantize_linear(weight, hessian, config), config)
        found = torch.cat([dense(piece, config) for piece in pieces])
        assert (found - alone).abs().mean() < 1e-3 * alone.abs().mean()  # a rounding may tip over


# --- whole models --------------------------------------------------------------------------------


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 50000.0, **changes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def texts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in [32] * count + [7, 20]]


def test_writes_autogptqs_layout(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    four, eight = tmp_path / "four", tmp_path / "eight"
    four.mkdir()
    eight.mkdir()
    reported: list[float] = []
    configs = {four: ACT_ORDER_4, eight: QuantizeConfig(8, -1, sym=False)}
    quantize_model(model, None, texts(), configs, lambda share, text: reported.append(share))
    assert reported == sorted(reported) and reported[0] == 0 and reported[-1] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    settings = json.loads((four / "quantize_config.json").read_text())
    assert settings["bits"] == 4 and settings["desc_act"] and settings["model_file_base_name"] == "gptq_model-4bit-32g"
    config = json.loads((four / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == 50000.0 and "rope_parameters" not in config and config["torch_dtype"] == "float16"
    assert (eight / "gptq_model-8bit--1g.safetensors").is_file()

    with safe_open(four / "gptq_model-4bit-32g.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(four / "gptq_model-4bit-32g.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    found = {name.rpartition(".")[2]: (value.dtype, tuple(value.shape)) for name, value in tensors.items() if layer in name}
    assert found == {
        "qweight": (torch.int32, (16, 64)),
        "qzeros": (torch.int32, (4, 8)),
        "scales": (torch.float16, (4, 64)),
        "g_idx": (torch.int32, (128,)),
    }
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    assert sum(name.endswith("qweight") for name in tensors) == 14

    read = LocalModel.read(four)
    assert read.kind == "gptq" and read.quantize is not None and read.quantize.summary == "4-bit, group 32, act-order"
    assert not read.quantize.notes
    other = LocalModel.read(eight).quantize
    assert other is not None and other.summary == "8-bit, no group, asymmetric" and not other.notes


def test_layers_with_one_input_share_their_order(tmp_path: Path) -> None:
    quantize_model(tiny_llama(), None, texts(), {tmp_path: ACT_ORDER_4})
    tensors = load_file(tmp_path / "gptq_model-4bit-32g.safetensors")

    def order(name: str) -> list[int]:
        return tensors[f"model.layers.0.{name}.g_idx"].tolist()

    assert order("self_attn.q_proj") == order("self_attn.k_proj") == order("self_attn.v_proj")
    assert order("mlp.gate_proj") == order("mlp.up_proj")
    assert order("self_attn.q_proj") != order("self_attn.o_proj")
    assert "lm_head.weight" in tensors  # not tied


def test_hessians_are_those_of_the_inputs() -> None:
    model = tiny_llama()
    layers = quantize.layers_to_pack(model)
    inputs: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, 128)))
    with torch.inference_mode():
        for ids in texts():
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    rows = torch.cat(inputs).double()
    hessians = {
        name: hessian for names, hessian in quantize._collect(model, layers, texts(), lambda share: None) for name in names
    }
    torch.testing.assert_close(hessians["model.layers.1.mlp.down_proj"].double(), rows.T @ rows, rtol=1e-4, atol=1e-6)


def test_a_large_model_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, limit_bytes in ((whole, 1 << 30), (parts, 100_000)):
        folder.mkdir()
        monkeypatch.setattr(quantize, "_HESSIAN_BYTES", limit_bytes)
        quantize_model(tiny_llama(), None, texts(), {folder: ACT_ORDER_4})
    first, second = (load_file(folder / "gptq_model-4bit-32g.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith("g_idx"))


def test_gpt2_has_conv1d_with_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=4)).eval()
    config = QuantizeConfig(8, 32)
    quantize_model(model, None, texts(), {tmp_path: config})
    tensors = load_file(tmp_path / "gptq_model-8bit-32g.safetensors")
    name = "transformer.h.0.attn.c_attn"
    packed = Packed(*(tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")))
    weight = model.transformer.h[0].attn.c_attn.weight.detach()  # [K, N]
    assert (dense(packed, config).T - weight).abs().max() < 0.01 * weight.abs().max()
    assert tensors[f"{name}.bias"].shape == (192,) and f"{name}.weight" not in tensors


def test_a_model_without_linear_layers_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="cannot be quantised"):
        quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), None, [], {tmp_path: ACT_ORDER_4})


def test_what_progress_raises_ends_the_work(tmp_path: Path) -> None:
    def stop(share: float, text: str) -> None:
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_llama(), None, texts(), {tmp_path: ACT_ORDER_4}, stop)
    assert not list(tmp_path.iterdir())
