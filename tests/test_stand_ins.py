"""gptq/cuda: what stands for a module of transformers computes all that the module is called with; without a GPU."""

import inspect
import os
from types import SimpleNamespace

import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_layer_kinds import of_architecture
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

from gptq_webui.gptq.cuda import activations, fused_norms, fused_router, shared_experts
from gptq_webui.gptq.cuda.cuda_experts import CudaExperts
from gptq_webui.gptq.cuda.cuda_weights import packing_of
from gptq_webui.gptq.cuda.fused_norms import CudaNorm, NormKind
from gptq_webui.gptq.cuda.merged_layers import Merging
from gptq_webui.gptq.experts import rows_and_choices
from gptq_webui.gptq.gptq_linear import GPTQLinear

CPU = torch.device("cpu")
GATED = [
    ("bamba", "BambaRMSNormGated", {}),
    ("granitemoehybrid", "GraniteMoeHybridRMSNormGated", {}),
    ("falcon_h1", "FalconH1RMSNormGated", {"norm_before_gate": True}),
    ("falcon_h1", "FalconH1RMSNormGated", {"norm_before_gate": False}),
    ("nemotron_h", "NemotronHRMSNormGated", {}),
    ("zamba2", "Zamba2RMSNormGated", {}),
    ("zamba2", "Zamba2RMSNormGated", {"group_size": 16}),
    ("mamba2", "MambaRMSNormGated", {}),
    ("qwen3_next", "Qwen3NextRMSNormGated", {}),
    ("qwen3_5", "Qwen3_5RMSNormGated", {}),
    ("qwen3_5_moe", "Qwen3_5MoeRMSNormGated", {}),
    ("olmo_hybrid", "OlmoHybridRMSNormGated", {}),
    ("kimi_linear", "KimiLinearRMSNormGated", {}),
    ("bailing_hybrid", "BailingHybridRMSNormGated", {}),
]
HYBRIDS = (
    "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2", "mamba2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
    "minimax", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2", "jamba", "deepseek_v2", "gemma2", "gpt_oss",
)  # fmt: skip
EVERY = os.environ.get("GPTQ_WEBUI_EVERY_ARCHITECTURE") == "1"


class NoGpu:
    """In the place of a Gpu whose kernels are not run."""

    def add_missing(self, **_given):
        pass


@pytest.fixture
def kernels(monkeypatch):
    """The kernels of norms in plain PyTorch; how often they were run."""
    runs = []

    def norm_of(_gpu, x, addend, norm, total=None, out=None):
        assert addend is None and total is None and out is None
        runs.append(norm)
        bias = None if norm.bias is None else norm.bias.float()
        return x, norm.kind.of(x.float(), norm.weight.float(), bias).to(x.dtype)

    monkeypatch.setattr(fused_norms, "norm_of", norm_of)
    monkeypatch.setattr(CudaNorm, "takes", lambda self, x: x.shape[-1] == self.weight.shape[0])
    return runs


def gated_norm(architecture, name, facts):
    try:
        made = of_architecture(architecture, name)
    except ImportError:
        pytest.skip("this transformers has no such architecture")
    known = inspect.signature(made).parameters  # a group's width came with later versions
    facts = {"eps": 1e-5, "group_size": 64, **facts}
    norm = made(64, **{name: value for name, value in facts.items() if name in known})
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize(("architecture", "name", "facts"), GATED)
def test_a_norm_that_may_take_a_gate_is_left_to_transformers(architecture, name, facts):
    norm = gated_norm(architecture, name, facts)
    assert fused_norms.kind_of(norm) is None
    model = nn.ModuleList([norm])
    assert fused_norms.replace_norms(model, {CPU: NoGpu()}) == 0 and model[0] is norm


@pytest.mark.parametrize(("architecture", "name", "facts"), GATED)
@torch.inference_mode()
def test_what_stands_for_a_norm_computes_no_gate_away(architecture, name, facts, kernels):
    norm = gated_norm(architecture, name, facts)
    stands = CudaNorm(NoGpu(), norm, NormKind(1e-5, 0.0, False))
    x, gate = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    wanted = norm(x, gate)
    stands._ready = x, torch.zeros_like(x)  # the norm of that sum alone, which is another one
    for found in (stands(x, gate), stands(x, gate=gate), stands(hidden_states=x, gate=gate)):
        assert torch.equal(found, wanted)
    assert not kernels and stands._ready is None
    assert torch.allclose(stands(x), NormKind(1e-5, 0.0, False).of(x, norm.weight, None)) and kernels == [stands]


@pytest.mark.parametrize("kind", [each for each in (KINDS if EVERY else HYBRIDS) if each in KINDS])
@torch.inference_mode()
def test_a_model_computes_the_same_with_its_norms_and_routers_replaced(kind, kernels):
    ids = torch.randint(4, 280, (1, 12), generator=torch.Generator().manual_seed(3))
    try:
        model = tiny_model(kind)
        wanted = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # of transformers' own, with no module of ours
        pytest.skip(f"this transformers cannot make it, or compute it here: {error}")
    replaced = fused_norms.replace_norms(model, {CPU: NoGpu()})
    fused_router.replace_routers(model, {CPU: NoGpu()})
    found = model(input_ids=ids, use_cache=False).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert bool(kernels) == bool(replaced) and (EVERY or replaced)


def test_norms_of_one_class_differ_by_their_own_numbers():
    class HalvedNorm(nn.Module):
        def __init__(self, halved):
            super().__init__()
            self.weight, self.eps, self.halved = nn.Parameter(torch.ones(64)), 1e-5, halved

        def forward(self, x):
            return NormKind(self.eps, 0.0, False).of(x, self.weight, None) * (0.5 if self.halved else 1)

    for first in (False, True):
        model = nn.ModuleList([HalvedNorm(first), HalvedNorm(not first)])
        assert fused_norms.replace_norms(model, {CPU: NoGpu()}) == 1
        assert [isinstance(each, CudaNorm) for each in model] == [not first, first]


def test_a_norm_over_channels_that_come_first_is_none():
    assert fused_norms.kind_of(nn.GroupNorm(1, 64)) is None


# -- MLPs ----------------------------------------------------------------------------------------------------------


def layer(rows, columns):
    made = GPTQLinear(rows, columns, 4, 32, bias=False)
    made.qweight.data.random_(-(2**31), 2**31 - 1)
    made.qzeros.data.random_(-(2**31), 2**31 - 1)
    made.scales.data.uniform_(0.005, 0.01)
    made.prepare()
    return made


class Mlp(nn.Module):
    def __init__(self, times=1.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer(64, 96), layer(64, 96), layer(96, 64)
        self.act_fn, self.times = nn.SiLU(), times

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.times


class ScaledMlp(Mlp):
    def forward(self, x, scale=None):
        return super().forward(x) if scale is None else super().forward(x * scale)


class AnyMlp(Mlp):
    def forward(self, x, **given):
        return super().forward(x * given.get("scale", 1))


def merged(model):
    """The names of MLPs' layers that would become one product."""
    packings = {name: packing_of([each]) for name, each in model.named_modules() if isinstance(each, GPTQLinear)}
    return [names for names, _layers, _build in Merging(model, packings, torch.float32).groups()]


def test_an_mlp_that_may_take_more_than_x_stays_as_it_is():
    torch.manual_seed(0)
    assert merged(nn.ModuleList([Mlp()])) == [["0.gate_proj", "0.up_proj"]]
    assert merged(nn.ModuleList([ScaledMlp()])) == merged(nn.ModuleList([AnyMlp()])) == []
    assert merged(nn.ModuleList([Mlp(), Mlp(0.5)])) == [["0.gate_proj", "0.up_proj"]]
    assert merged(nn.ModuleList([Mlp(0.5), Mlp()])) == [["1.gate_proj", "1.up_proj"]]


class CutMlp(Mlp):
    """As DeepSeek V4's, whose limit only large gates show."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x).clamp(-10, 10))


def test_an_mlp_that_cuts_off_what_is_large_stays_as_it_is():
    assert merged(nn.ModuleList([CutMlp(), Mlp()])) == [["1.gate_proj", "1.up_proj"]]


def test_an_activation_that_cuts_off_what_is_large_is_another_one():
    assert activations.number_of(ACT2FN["gelu"], CPU) == 2 and activations.number_of(ACT2FN["gelu_10"], CPU) is None


def test_an_mlp_that_must_know_its_layer_is_not_tried():
    if "zamba2" not in KINDS:
        pytest.skip("this transformers has no such architecture")
    pytest.importorskip("numba")
    from test_families import packed

    hf, _twin = packed("zamba2", {"n_mamba_heads": 8, "mamba_headdim": 16}, act_order=False)
    assert not [each for names in merged(hf) for each in names if "gate_up_proj" in each]


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_a_router_that_keeps_the_shape_of_its_tokens_is_given_rows_alone():
    class Router(nn.Module):
        top_k = 2

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 64).half())

        def forward(self, x):
            logits = nn.functional.linear(x, self.weight)
            scores, chosen = logits.softmax(-1).topk(2, -1)
            return logits, scores, chosen

    kind = fused_router.kind_of(Router())
    assert kind is not None and not kind.flattens
    router = Router()
    router.weight.data.normal_()
    stands = fused_router.CudaRouter(NoGpu(), router, kind)
    stands._takes = lambda x, most: True
    stands._route = lambda x, scores, chosen: "by the kernel"
    x = torch.randn(1, 1, 64).half()
    assert stands(x[0])[0] == "by the kernel"
    for found in (stands(x), stands(x=x), stands(x=x[0])):
        assert torch.equal(found[0].view(1, 8), router(x[0])[0])
    flattens = of_architecture("qwen3_moe", "Qwen3MoeTopKRouter")
    config = AutoConfig.for_model("qwen3_moe", hidden_size=64, num_experts=16, num_experts_per_tok=4)
    assert fused_router.kind_of(flattens(config).half()).flattens


def test_experts_take_choices_however_an_architecture_gives_them():
    given = []

    class Experts(CudaExperts):
        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts = 4

        def _chosen_only(self, x, chosen, weights, constant=0):
            given.append((x, chosen, weights))
            return x

    x, chosen = torch.randn(2, 3, 8), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2], [1, 3]])
    weights = torch.rand(6, 2)
    every = torch.zeros(6, 4).scatter(1, chosen, weights)
    for choices in ((chosen, weights), (every, chosen)):
        assert Experts()(x, *choices).shape == x.shape
        found, numbers, by = given.pop()
        assert torch.equal(found, x.view(6, 8)) and torch.equal(numbers, chosen.view(-1)) and torch.equal(by, weights)
    rows = rows_and_choices(x, every, chosen)
    assert torch.equal(rows[1], chosen) and torch.equal(rows[2], weights)


def test_a_shared_expert_that_takes_more_than_x_is_left():
    class Shared(nn.Module):
        act_fn = nn.SiLU()

        def forward(self, x, gammas=None):
            return x

    block = SimpleNamespace(gate=nn.Linear(8, 4))
    assert not shared_experts._is_sum(block, Shared(), SimpleNamespace(act_fn=nn.SiLU()), torch.float16)


def test_a_block_that_is_called_with_more_than_its_tokens_is_computed_by_itself():
    class Block:
        gate = object.__new__(fused_router.CudaRouter)

        def forward(self, hidden_states, **given):
            return hidden_states, given

    block = Block()
    shared_experts.choose_shared(block, 1)
    assert block.forward(1, ids=2) == (1, {"ids": 2}) and block.forward(hidden_states=1) == (1, {})
