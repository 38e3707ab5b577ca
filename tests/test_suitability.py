"""gptq/suitability.py: a model is compared with the kernels before one is built from it; a mismatch is one sentence."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("numba")

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.cpu import cpu_step
from gptq_webui.gptq.cuda import model_shape
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.families.parts import Norm
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.gptq.suitability import Unsuited, require_sound, shape_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("suitability") / "model"
    tiny.write(path, "qwen3")
    return path


def load(folder, dtype=torch.float32):
    return checkpoint.load(LocalModel.read(folder), dtype=dtype, device_map={"": "cpu"})[0]


@pytest.fixture
def hf(folder):
    return load(folder)


def layer_of(hf):
    return hf.model.layers[1].self_attn.k_proj


@pytest.mark.parametrize(("part", "alter", "says"), [
    ("qweight", lambda each: each.float(), "has its qweight as fp32; int32 was expected"),
    ("qweight", lambda each: each[:-1], "has qweight 7×32; 8×32 was expected"),
    ("qweight", lambda each: each.T.contiguous(), "has qweight 32×8; 8×32 was expected of 64 inputs, 32 outputs and 2 groups"),
    ("qzeros", lambda each: each.short(), "has its qzeros as int16"),
    ("qzeros", lambda each: each[:, :-1], "has qzeros 2×3; 2×4 was expected"),
    ("scales", lambda each: each.int(), "has its scales as int32; fp16 or bf16 or fp32 was expected"),
    ("scales", lambda each: each[:1], "has scales 1×32; 2×32 was expected"),
    ("g_idx", lambda each: each[:-4], "has g_idx 60; 64 was expected"),
    ("g_idx", lambda each: each + 1, "names group 2 in its g_idx, but it has the groups 0 to 1"),
    ("g_idx", lambda each: each - 1, "names group -1 in its g_idx"),
    ("bias", lambda _each: torch.zeros(3), "has bias 3; 32 was expected"),
])  # fmt: skip
def test_a_packed_layer_that_is_not_what_it_claims_is_refused_by_every_path(part, alter, says, hf, monkeypatch):
    layer = layer_of(hf)
    old = getattr(layer, part)
    setattr(layer, part, nn.Parameter(alter(old.data if old is not None else None), requires_grad=False))
    for installed in (True, False):
        monkeypatch.setattr("gptq_webui.gptq.cpu.numba_compiler.available", lambda installed=installed: installed)
        with pytest.raises(BadCheckpoint, match=r"packed layer model\.layers\.1\.self_attn\.k_proj") as caught:
            stepper_for(hf, 64)
        assert says in str(caught.value) and str(caught.value).endswith("download the model again.")
    assert all(each.qweight.numel() for each in hf.modules() if isinstance(each, GPTQLinear)), "nothing was taken"


def test_tensors_with_gaps_are_closed_up(hf):
    layer = layer_of(hf)
    wanted = layer.dequantize()
    for part in ("qweight", "qzeros", "scales"):
        tensor = getattr(layer, part)
        wide = torch.cat([tensor.data, tensor.data], 1)
        tensor.data = wide[:, : tensor.shape[1]]
        assert not tensor.is_contiguous()
    require_sound(hf)
    assert all(getattr(layer, part).is_contiguous() for part in ("qweight", "qzeros", "scales"))
    assert torch.equal(layer.dequantize(), wanted)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def norm(weight, bias=None, eps=1e-6):
    return Norm(weight, bias, eps)


def in_layer(**change):
    return lambda parts: replace(parts, layers=(parts.layers[0], replace(parts.layers[1], **change)))


@pytest.mark.parametrize(("alter", "says"), [
    (lambda parts: replace(parts, heads=3), "3 heads that share the keys of 2"),
    (lambda parts: replace(parts, kv_heads=0), "share the keys of 0"),
    (lambda parts: replace(parts, heads=8), "sizes are not those of the heads"),
    (lambda parts: replace(parts, head_dim=8), "heads of 8 dimensions"),
    (lambda parts: replace(parts, rotary_dim=34), "34 rotated dimensions in heads of 16"),
    (lambda parts: replace(parts, norm=norm(torch.ones(64), eps=float("nan"))), "epsilon of nan"),
    (lambda parts: replace(parts, head=linear(48, 288)), "not as wide as the embedding"),
    (lambda parts: replace(parts, head=linear(64, 300)), "300 outputs for 288 embeddings"),
    (lambda parts: replace(parts, head=nn.Conv1d(64, 288, 1)), "neither packed nor a plain linear"),
    (lambda parts: replace(parts, norm=norm(torch.ones(32))), "norms that are not as wide"),
    (lambda parts: replace(parts, layers=()), "no layers"),
    (in_layer(qkv=(linear(64, 128),)), "made of different parts"),
    (in_layer(gate_up=(linear(64, 192),)), "made of different parts"),
    (in_layer(gate_up=(linear(64, 96), linear(64, 80))), "gate and up are not as wide"),
    (in_layer(o=linear(32, 64)), "layers of different sizes"),
    (in_layer(o=linear(64, 48)), "not as wide as the residual"),
    (in_layer(q_norm=None), "norms of queries or of keys only"),
    (in_layer(q_norm=norm(torch.ones(8))), "not as wide as a head"),
    (in_layer(mlp_norm=norm(torch.ones(64, device="meta"))), "several devices"),
])  # fmt: skip
def test_parts_that_do_not_fit_together_reach_no_step(alter, says, folder):
    parts = parts_of(load(folder))
    assert shape_of(parts, cpu_step.LIMITS).inner == 96
    with pytest.raises(Unsuited, match=says):
        cpu_step.CpuStepper(alter(parts), 64, 1)
    assert all(each.qweight.numel() for each in parts.linears() if isinstance(each, GPTQLinear)), "nothing was taken"


def test_norms_of_the_heads_in_some_layers_are_for_the_processor_alone(folder):
    parts = in_layer(q_norm=None, k_norm=None)(parts_of(load(folder)))
    assert shape_of(parts, cpu_step.LIMITS).options.qk_norm == "head"
    with pytest.raises(Unsuited, match="norms of the heads in some layers"):
        shape_of(parts, replace(model_shape.LIMITS, head_dims=()))


def test_each_kernel_has_limits_of_its_own(folder):
    parts = parts_of(load(folder, torch.float16))
    shape_of(parts, cpu_step.LIMITS)
    with pytest.raises(Unsuited, match=r"heads of 16 dimensions \(the kernels have 32, 64, 96, 128\)"):
        shape_of(parts, model_shape.LIMITS)
    with pytest.raises(Unsuited, match="numbers other than fp16"):
        shape_of(parts_of(load(folder)), model_shape.LIMITS)


def test_a_model_without_a_step_of_its_own_is_computed_layer_by_layer(tmp_path, monkeypatch):
    """Heads of 24 numbers: 16 does not divide them."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", {**tiny._LLAMA, "head_dim": 24})
    twin = tiny.write(tmp_path / "model")
    stepper, note = stepper_for(load(tmp_path / "model"), 64)
    assert stepper.kernel == "transformers" and note == ""
    ids = list(range(7, 40))
    with torch.inference_mode():
        found, wanted = stepper.prefill(stepper.begin(), ids)[0], twin(torch.tensor([ids])).logits[0, -1]
    assert float((found - wanted).norm() / wanted.norm()) < 3e-3


def test_no_step_computes_past_the_context_it_was_made_for(folder):
    from gptq_webui.core.errors import BadParameter

    stepper, _note = stepper_for(load(folder), 32)
    memory = stepper.begin()
    with torch.inference_mode():
        stepper.prefill(memory, [5] * 30)
        with pytest.raises(BadParameter, match="would have 33 tokens; the model is loaded for 32"):
            stepper.prefill(memory, [5] * 3)
        assert memory.length == 30 and stepper.prefill(memory, [5] * 2).shape == (1, 288)
    stepper.close()
