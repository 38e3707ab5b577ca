"""gptq/cuda: what a norm, a router, an activation or an index is, found by trying it; without a GPU."""

import importlib
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from every_architecture import tiny_model
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from gptq_webui.gptq.cuda import activations, attention_names, fused_norms, fused_router
from gptq_webui.gptq.recording import NumbersMadeThere, _as_slices


def of_architecture(architecture, name):
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    if not hasattr(module, name):
        pytest.skip("this transformers has no such module")
    return getattr(module, name)


def test_a_list_of_one_number_is_a_slice():
    x = torch.arange(24.0).view(2, 3, 4)
    for index in ((..., [-2], slice(None)), (slice(None), [1]), (..., [-1]), (0, [0], slice(1, 3))):
        assert all(not isinstance(each, list) for each in _as_slices(index)) or 0 in index
        with NumbersMadeThere():
            assert torch.equal(x[index], x.clone()[index])
        assert torch.equal(x[_as_slices(index)], x[index])
    kept = (..., [0, 1], slice(None))
    assert _as_slices(kept) is kept
    assert _as_slices((torch.tensor([1]), [0]))[1] == [0]


@pytest.mark.parametrize(
    ("architecture", "name", "offset"),
    [("llama", "LlamaRMSNorm", 0.0), ("gemma2", "Gemma2RMSNorm", 1.0), ("olmo2", "Olmo2RMSNorm", 0.0)],
)
def test_an_rmsnorm_is_recognised(architecture, name, offset):
    norm = of_architecture(architecture, name)(64, eps=1e-5)
    before = norm.weight.data.clone()
    assert fused_norms.kind_of(norm) == fused_norms.NormKind(1e-5, offset, False)
    assert torch.equal(norm.weight.data, before)


def test_a_layernorm_is_recognised_and_another_module_is_not():
    assert fused_norms.kind_of(nn.LayerNorm(64)) == fused_norms.NormKind(1e-5, 0.0, True)
    assert fused_norms.kind_of(nn.LayerNorm(64, bias=False)) == fused_norms.NormKind(1e-5, 0.0, True)
    assert fused_norms.kind_of(nn.Linear(64, 64)) is None
    assert fused_norms.kind_of(nn.LayerNorm(60)) is None  # no whole runs of eight

    class OtherNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-5

        def forward(self, x):
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    assert fused_norms.kind_of(OtherNorm()) is None


@pytest.mark.parametrize(
    ("activation", "number"),
    [
        (nn.SiLU(), 0),
        (nn.GELU(approximate="tanh"), 1),
        (nn.GELU(), 2),
        (nn.ReLU(), 3),
        (ACT2FN["relu2"], 4),
        (nn.Tanh(), None),
        (nn.Softmax(0), None),
    ],
)
def test_an_activation_has_its_number(activation, number):
    assert activations.number_of(activation, torch.device("cpu")) == number


@pytest.mark.parametrize("shared", [False, True])
def test_a_router_is_recognised(shared):
    from transformers import AutoConfig

    made = of_architecture("qwen3_moe", "Qwen3MoeTopKRouter")
    config = AutoConfig.for_model("qwen3_moe", hidden_size=64, num_experts=16, num_experts_per_tok=4, norm_topk_prob=shared)
    router = made(config).half()
    found = fused_router.kind_of(router)
    assert found == fused_router.RouterKind(4, wide=False, wide_scores=False, probabilities=False, shared=shared, scale=1.0)


def test_a_router_with_another_score_is_not():
    class Router(nn.Module):
        top_k = 2

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 64).half())

        def forward(self, x):
            logits = functional.linear(x, self.weight)
            scores, chosen = logits.sigmoid().topk(2, -1)
            return logits, scores, chosen

    assert fused_router.kind_of(Router()) is None


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_of_ours_is_asked_under_the_name_of_either_of_theirs(kind, name, monkeypatch):
    """transformers 4 does not look into its registry for what is called eager."""
    model, asked = tiny_model(kind), []
    if kind == "gemma2" and name == "sdpa":
        pytest.skip("its caps need eager attention")
    model.config._attn_implementation_internal = name
    decoder = SimpleNamespace(decode=lambda *given: asked.append(given))
    monkeypatch.setattr(attention_names, "decoders", [decoder])
    with ExitStack() as undo, torch.inference_mode():
        attention_names.name_attention(attention_names.configs_of(model), undo)
        own = model.config._attn_implementation
        assert own == name and own in ("eager", "sdpa") and own != "flex_attention" and not own != own  # noqa: SIM202
        found = model(torch.tensor([[1, 2, 3]])).logits
    assert len(asked) == model.config.num_hidden_layers
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, found)
    assert type(model.config._attn_implementation) is str
