"""gptq/cuda: single layers of other architectures' forward on a GPU, each against plain PyTorch in fp32."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptq_webui.gptq.cuda import activations, fused_router
from gptq_webui.gptq.cuda.cuda_linear import linear_of
from gptq_webui.gptq.cuda.cuda_weights import packing_of
from gptq_webui.gptq.cuda.fused_forward import FusedForward
from gptq_webui.gptq.cuda.fused_norms import CudaNorm, replace_norms
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant
from gptq_webui.gptq.cuda.merged_layers import Part
from gptq_webui.gptq.cuda.replaced_layers import replace_layers
from gptq_webui.gptq.gptq_linear import GPTQLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
NUMBERS = [torch.float16, torch.bfloat16]


def limit(dtype):
    return 2e-3 if dtype == torch.float16 else 8e-3


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def layer(k, n, *, act_order=False, bits=4, group_size=32, bias=False, rows=None):
    made = GPTQLinear(k, n, bits, group_size, bias=bias, device="cuda")
    made.qweight.data.random_(-(2**31), 2**31 - 1)
    made.qzeros.data.random_(-(2**31), 2**31 - 1)
    made.scales.data.uniform_(0.5, 1.5).mul_(2 / 2**bits / k**0.5)
    if act_order:
        made.g_idx.data = made.g_idx.data[torch.randperm(k, device="cuda") if rows is None else rows]
    if bias:
        made.bias.data.normal_()
    made.prepare()
    return made


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("k", "n", "act_order", "bits"),
    [
        (256, 96, False, 4),
        (4544, 130, False, 4),
        (608, 4672, True, 4),
        (12288, 64, True, 8),
        (320, 72, True, 3),
        (96, 8, False, 2),
    ],
)
def test_a_row_is_multiplied_as_it_lies(gpu, k, n, act_order, bits, dtype):
    torch.manual_seed(k)
    packed = layer(k, n, act_order=act_order, bits=bits, bias=True)
    x = torch.randn(1, 3, k, device="cuda", dtype=dtype)
    wanted = packed(x.float())
    packing = packing_of([packed])
    gpu.add_missing(packings=[packing])
    linear = linear_of(gpu, [packed], packing, dtype)
    gpu.add_missing(variants=[linear.variant])
    assert linear(x).dtype == dtype
    assert error(linear(x), wanted) < limit(dtype)
    for at in range(3):
        assert error(linear(x[:, at : at + 1]), wanted[:, at : at + 1]) < limit(dtype)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("number", range(5))
def test_a_gated_product_applies_its_activation(gpu, number, dtype):
    torch.manual_seed(number)
    gate, up = layer(256, 200), layer(256, 200)
    x = torch.randn(4, 256, device="cuda", dtype=dtype)
    wanted = activations.apply(number, gate(x.float())) * up(x.float())
    packing = packing_of([gate, up])
    gpu.add_missing(packings=[packing])
    linear = linear_of(gpu, [gate, up], packing, dtype, number)
    gpu.add_missing(variants=[linear.variant])
    assert error(linear(x), wanted) < limit(dtype)
    for at in range(4):
        assert error(linear(x[at : at + 1]), wanted[at : at + 1]) < limit(dtype)


class Block(nn.Module):
    """As transformers writes a gated MLP and three projections."""

    dtype = torch.float16

    def __init__(self):
        super().__init__()
        rows = torch.randperm(128, device="cuda")
        self.q_proj, self.k_proj, self.v_proj = (layer(128, n, act_order=True, rows=rows) for n in (128, 64, 64))
        self.mlp = Mlp()

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.v_proj(x), self.k_proj(x)], -1), self.mlp(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer(128, 256), layer(128, 256), layer(256, 128)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = layer(128, 256, bias=True), layer(256, 128), nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class OtherMlp(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("mlp", [Mlp, PlainMlp, OtherMlp])
def test_layers_of_one_input_become_one_product_where_their_module_does_the_same(mlp):
    torch.manual_seed(0)
    block = Block()
    block.mlp = mlp()
    x = torch.randn(5, 128, device="cuda").half()
    wanted = block(x.float())
    assert replace_layers(block) == (5 if mlp is PlainMlp else 6, 0)
    assert isinstance(block.k_proj, Part)
    assert hasattr(block.mlp, "applied_by_gptq_webui") == (mlp is not OtherMlp)
    for rows in (x, x[:1], x[1:2]):
        found = block(rows)
        at = slice(1, 2) if rows.data_ptr() != x.data_ptr() else slice(0, rows.shape[0])
        assert error(found[0], wanted[0][at]) < 2e-3
        assert error(found[1], wanted[1][at]) < 4e-3
    assert error(block.k_proj(x[:1]), wanted[0][:1, 192:]) < 2e-3  # asked for alone


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("architecture", "name", "width"),
    [
        ("llama", "LlamaRMSNorm", 64),
        ("gemma2", "Gemma2RMSNorm", 3584),
        ("gpt_oss", "GptOssRMSNorm", 2880),
        ("qwen3_next", "Qwen3NextRMSNormGated", 64),
    ],
)
def test_norms_are_recognised_and_computed(gpu, architecture, name, width, dtype):
    made = nn.LayerNorm(width) if name == "nn.LayerNorm" else None
    made = made or getattr(importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}"), name)(
        width, eps=1e-6
    )
    made = made.to("cuda", dtype)
    for each in made.parameters():
        each.data = torch.rand(width, device="cuda").to(dtype)
    x = torch.randn(2, 3, width, device="cuda", dtype=dtype) * 3
    model = nn.Sequential(made)
    replace_norms(model, {torch.device("cuda", 0): gpu})
    if "Gated" in name:
        assert not isinstance(model[0], CudaNorm)
        return
    found = model[0]
    assert isinstance(found, CudaNorm)
    weight, bias = (None if each is None else each.data.clone() for each in (found.weight, found.bias))
    wide = made.float()  # the same parameters
    for each, data in ((wide.weight, weight), (getattr(wide, "bias", None), bias)):
        if each is not None:
            each.data = data.float()
    wanted, after = wide(x.float()), wide((x + x[:1]).float())
    found.weight.data, addend = weight, x[:1].expand_as(x).contiguous()
    if bias is not None:
        found.bias.data = bias
    assert error(found(x), wanted) < limit(dtype)
    total = found.after_adding(x, addend)
    assert torch.equal(total, x + addend)
    assert error(found(total), after) < limit(dtype)
    assert error(found(x), wanted) < limit(dtype)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("architecture", "angles"), [("llama", 64), ("glm4", 32), ("cohere", 64), ("gpt_neox", 16)])
def test_rotations_are_recognised_and_computed(architecture, angles, dtype):
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    fused = FusedForward(nn.Linear(1, 1), torch.device("cuda", 0))
    q, k = (torch.randn(1, 1, heads, 64, device="cuda", dtype=dtype).transpose(1, 2) for heads in (8, 2))
    cos, sin = (torch.randn(1, 1, angles, device="cuda", dtype=dtype) for _ in range(2))
    wanted = module.apply_rotary_pos_emb(q.float(), k.float(), cos.float(), sin.float())
    found = fused._rotation(module.apply_rotary_pos_emb)(q, k, cos, sin)
    assert next(iter(fused._rotations.values())) is not None
    assert all(error(a, b) < limit(dtype) for a, b in zip(found, wanted, strict=True))
    fused.close()


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "values_dim"),
    [(8, 2, 64, 64), (16, 8, 256, 256), (71, 1, 64, 64), (4, 4, 192, 128), (6, 2, 32, 32), (5, 5, 80, 80), (32, 2, 128, 128)],
)
@pytest.mark.parametrize("case", ["plain", "bool", "added", "cap", "sinks", "of heads"])
def test_attention_of_one_token(heads, kv_heads, dims, values_dim, case, dtype):
    torch.manual_seed(1)
    fused = FusedForward(nn.Linear(1, 1), torch.device("cuda", 0))
    for before, shown in ((0, 64), (77, 128), (900, 1024)):
        q = torch.randn(1, heads, 1, dims, device="cuda", dtype=dtype)
        keys = torch.randn(1, kv_heads, 2048, dims, device="cuda", dtype=dtype)[:, :, :shown]
        values = torch.randn(1, kv_heads, 2048, values_dim, device="cuda", dtype=dtype)[:, :, :shown]
        keys.tokens_before = torch.tensor([before], device="cuda")
        seen = torch.arange(shown, device="cuda") <= before
        mask, given, add = None, {"scaling": 0.1}, torch.where(seen, 0.0, -torch.inf)
        if case in ("bool", "added", "of heads"):
            seen = seen & (torch.rand(shown, device="cuda") < 0.7)
            seen[before] = True
            add = torch.where(seen, 0.0, -torch.inf)
            mask = seen.view(1, 1, 1, -1)
        if case == "added":
            mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).view(1, 1, 1, -1)
        if case == "of heads":
            slopes = torch.rand(heads, 1, device="cuda") * torch.arange(shown, device="cuda") * 0.01
            mask = torch.where(seen, slopes, torch.finfo(torch.float32).min).view(1, heads, 1, -1)
            add = add + slopes
        scores = torch.einsum("hd,htd->ht", q.float()[0, :, 0], keys.float()[0].repeat_interleave(heads // kv_heads, 0)) * 0.1
        if case == "cap":
            given["softcap"] = 3.0
            scores = 3 * torch.tanh(scores / 3)
        scores = scores + add
        if case == "sinks":
            given["s_aux"] = torch.randn(heads, device="cuda").to(dtype)
            scores = torch.cat([scores, given["s_aux"].float()[:, None]], -1)
        weights = scores.softmax(-1)[:, :shown]
        wanted = torch.einsum("ht,htd->hd", weights, values.float()[0].repeat_interleave(heads // kv_heads, 0))
        for again in range(2):  # the counters are ready for the next launch
            if again:  # the token itself comes apart from the others
                keys.new_token = keys[:, :, before].unsqueeze(2).clone(), values[:, :, before].unsqueeze(2).clone()
                kept = keys[:, :, before].clone(), values[:, :, before].clone()
                keys[:, :, before], values[:, :, before] = 0, 0
            found = fused.decode(q, keys, values, mask, given)
            assert found is not None and found.shape == (1, 1, heads, values_dim)
            assert error(found[0, 0], wanted) < limit(dtype)
        assert torch.equal(keys[:, :, before], kept[0]) and torch.equal(values[:, :, before], kept[1])
    fused.close()


def test_attention_leaves_what_it_cannot_compute():
    fused = FusedForward(nn.Linear(1, 1), torch.device("cuda", 0))
    q, k = torch.randn(1, 4, 1, 64, device="cuda").half(), torch.randn(1, 2, 64, 64, device="cuda").half()
    assert fused.decode(q, k, k, None, {}) is None  # not of a cache at fixed addresses
    k.tokens_before = torch.tensor([3], device="cuda")
    assert fused.decode(q, k, k, None, {"position_bias": q}) is None
    assert fused.decode(q, k, k, None, {"sliding_window": 8}) is None  # a window that no mask shows
    assert fused.decode(q.float(), k, k, None, {}) is None
    fused.close()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("architecture", "name", "facts"),
    [
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}),
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}),
        ("qwen3_next", "Qwen3NextTopKRouter", {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True}),
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 600, "num_experts_per_tok": 9, "norm_topk_prob": True}),
        ("mixtral", "MixtralTopKRouter", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 32, "num_experts_per_tok": 4}),
        ("deepseek_v2", "DeepseekV2TopkRouter", {"n_routed_experts": 64, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5}),
    ],
)
def test_routers_are_recognised_and_computed(gpu, architecture, name, facts, dtype, wide):
    from transformers import AutoConfig

    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    if not hasattr(module, name):
        pytest.skip("this transformers has no such router")
    torch.manual_seed(0)
    router = getattr(module, name)(AutoConfig.for_model(architecture, hidden_size=256, **facts)).to("cuda", dtype)
    for each in router.parameters():
        each.data = torch.randn(each.shape, device="cuda").to(dtype) * 0.1
    if wide:  # weights that stay in fp32, of a module that allows it
        if architecture != "deepseek_v2":
            pytest.skip("this router multiplies numbers of one type")
        router.weight.data = torch.randn(router.weight.shape, device="cuda") * 0.1
    found = fused_router.kind_of(router, dtype)
    assert found is not None
    gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
    own = fused_router.CudaRouter(gpu, router, found, dtype)
    for _ in range(20):
        x = torch.randn(1, 256, device="cuda").to(dtype)
        wanted, same = router(x), own(x)
        assert [each.dtype for each in wanted] == [each.dtype for each in same]
        assert [each.shape for each in wanted] == [each.shape for each in same]
        assert error(same[0], wanted[0]) < limit(dtype)
        spread = [torch.zeros(wanted[0].shape[1], device="cuda").scatter(0, b[0], a[0].float()) for _all, a, b in (wanted, same)]
        if set(wanted[2][0].tolist()) == set(same[2][0].tolist()):  # else two logits are equal but for rounding
            assert error(spread[1], spread[0]) < limit(dtype)


def test_a_router_that_chooses_otherwise_is_left(gpu):
    class Router(nn.Module):
        top_k = 2

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 64, device="cuda").half())

        def forward(self, x):
            logits = functional.linear(x, self.weight)
            scores, chosen = logits.sigmoid().topk(2, -1)
            return logits, scores, chosen

    assert fused_router.kind_of(Router()) is None
