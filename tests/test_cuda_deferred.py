"""gptq/cuda/deferred.py: what is written when; and on a GPU the kernels that compute it themselves."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from gptq_webui.gptq.cuda import deferred
from gptq_webui.gptq.cuda.cuda_linear import CudaLinear
from gptq_webui.gptq.cuda.deferred import Deferred
from gptq_webui.gptq.cuda.fused_forward import FusedForward
from gptq_webui.gptq.cuda.fused_norms import NARROW, ChosenRows, CudaNorm, norm_of, replace_norms
from gptq_webui.gptq.cuda.fused_router import replace_routers
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant
from gptq_webui.gptq.cuda.replaced_layers import replace_layers

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).parents[1] / "benchmarks" / "random_models.py")
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
NUMBERS = [torch.float16, torch.bfloat16]


class Watching(TorchFunctionMode):
    def __init__(self, deferred):
        super().__init__()
        self.deferred = deferred

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.deferred.call(func, args, kwargs or {})


@pytest.fixture
def waiting():
    """(what is held, an input, a tensor that is twice the input once it is written, how often it was)."""
    deferred, x, out, written = Deferred(), torch.ones(4), torch.full((4,), torch.nan), []

    def run():
        written.append(1)
        out.copy_(x * 2)

    deferred.defer((out,), (x,), "twice", run)
    return deferred, x, out, written


def test_nothing_is_written_for_a_question_or_another_view(waiting):
    deferred, _x, out, written = waiting
    with Watching(deferred):
        assert out.shape == (4,) and out.dim() == 1 and out.numel() == 4 and out.dtype == torch.float32
        view = out.view(2, 2)
        other = view.reshape(1, 4)
    assert not written and deferred.what(other, str) == "twice" and deferred.what(other, int) is None


@pytest.mark.parametrize(
    "use",
    [
        lambda out: out + 0, lambda out: torch.cat([out, out])[:4], lambda out: out.T, lambda out: out.view(2, 2)[:1].clone(),
        lambda out: nn.functional.linear(out, torch.eye(4)), lambda out: out.data_ptr(), lambda out: torch.stack([out])[0],
    ],
)  # fmt: skip
def test_any_other_use_has_it_written_first_and_once(waiting, use):
    deferred, _x, out, written = waiting
    with Watching(deferred):
        found = use(out)
        use(out)
    assert written == [1] and torch.equal(out, torch.full((4,), 2.0)) and deferred.what(out, str) is None
    assert not isinstance(found, torch.Tensor) or bool((found == 2).all())


def test_it_is_written_before_its_input_changes(waiting):
    deferred, x, out, written = waiting
    with Watching(deferred):
        torch.zeros(4).add_(1)
        assert not written
        x[:2].mul_(5)
    assert written and torch.equal(out, torch.full((4,), 2.0))


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu():
    made = Gpu(torch.device("cuda", 0))
    made.add(variants=[LayerVariant(False), LayerVariant(True)])
    return made


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class Sandwich(nn.Module):
    """A block's end of Gemma 2: what it gives is normed, added, and the sum is normed for the next one."""

    def __init__(self, width, swapped):
        super().__init__()
        norm = importlib.import_module("transformers.models.gemma2.modeling_gemma2").Gemma2RMSNorm
        self.post, self.pre, self.swapped = norm(width), norm(width), swapped
        for each in (self.post, self.pre):
            each.weight.data = torch.rand(width)

    def forward(self, x, y, both):
        y = self.post(y)
        x = y + x if self.swapped else x + y
        return (x, self.pre(x), y * 1) if both else (x, self.pre(x))


@on_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("width", [256, 2880, 8192])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_normed_row_is_added_and_the_sum_normed(gpu, dtype, width, both, swapped):
    torch.manual_seed(0)
    block = Sandwich(width, swapped).to("cuda", dtype)
    x, y = (torch.randn(1, 1, width, device="cuda", dtype=dtype) * each for each in (2, 9))
    wanted = block(x, y, both)
    replace_norms(block, {torch.device("cuda", 0): gpu})
    assert isinstance(block.post, CudaNorm)
    fused = FusedForward(block, torch.device("cuda", 0))
    with torch.inference_mode(), fused.recording():
        for _ in range(3):
            fused.begin()
            found = block(x, y, both)
            assert all(error(a, b) < (2e-3 if dtype == torch.float16 else 8e-3) for a, b in zip(found, wanted, strict=True))
    fused.close()


class Block(nn.Module):
    """A norm before a product, or the sums of a block before it, and what the next block adds."""

    def __init__(self, k, n, bits, act_order, sandwich, centred):
        super().__init__()
        norm = importlib.import_module("transformers.models.gemma2.modeling_gemma2").Gemma2RMSNorm
        norm = nn.LayerNorm if centred else norm
        self.first, self.post, self.pre = norm(k), norm(k) if sandwich else nn.Identity(), norm(k)
        for each in (self.first, self.post, self.pre):
            for parameter in each.parameters():
                parameter.data = torch.rand(k)
        rows = torch.randperm(k, device="cuda") if act_order else None
        self.a = random_models.random_layer(k, n, bits, 64, sym=True, rows=rows)
        self.b = random_models.random_layer(k, n, bits, 64, sym=True, rows=rows)

    def forward(self, x, y):
        first = self.a(self.first(x))
        x = x + self.post(y)
        z = self.pre(x)
        return first, self.a(z), self.b(z), x + y, z[..., :8] * 1


@on_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("k", "n", "bits"), [(256, 264, 4), (3584, 512, 4), (736, 408, 4), (7168, 256, 8), (2880, 512, 3)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("sandwich", "centred"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_norms_and_adds_what_waits(gpu, dtype, k, n, bits, act_order, sandwich, centred):
    torch.manual_seed(0)
    block = Block(k, n, bits, act_order, sandwich, centred).to("cuda")
    block.dtype = dtype
    for norm in (block.first, block.post, block.pre):
        norm.to(dtype)
    x, y = (torch.randn(1, 1, k, device="cuda", dtype=dtype) * each for each in (2, 9))
    replace_layers(block)
    wanted = block(x, y)
    assert isinstance(block.a, CudaLinear) and isinstance(block.pre, CudaNorm)
    fused = FusedForward(block, torch.device("cuda", 0))
    with torch.inference_mode(), fused.recording():
        for _ in range(3):
            fused.begin()
            found = block(x, y)
            for a, b in zip(found, wanted, strict=True):
                assert error(a, b) < (1e-3 if dtype == torch.float16 else 4e-3)
    assert block.a._normed is not None and block.b._normed is not None
    fused.close()


@on_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_what_experts_give_is_added_and_the_sum_normed(gpu, dtype, wide, biased):
    torch.manual_seed(0)
    width, choices, experts = 2048, 8, 11
    assert width <= NARROW
    norm = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeRMSNorm(width).to("cuda", dtype)
    model = nn.Sequential(norm)
    replace_norms(model, {torch.device("cuda", 0): gpu})
    x = torch.randn(1, width, device="cuda", dtype=dtype)
    y = torch.randn(choices, width, device="cuda")
    weights = torch.rand(1, choices, device="cuda", dtype=torch.float32 if wide else dtype)
    bias = torch.randn(experts, width, device="cuda") if biased else None
    chosen = torch.randperm(experts, device="cuda")[:choices]
    total, normed = norm_of(gpu, x, ChosenRows(y, weights, bias, chosen, experts), model[0])
    rows = y if bias is None else y + bias[chosen]
    wanted = x.float() + (rows * weights.float()[0, :, None]).sum(0)
    limit = 2e-3 if dtype == torch.float16 else 8e-3
    assert error(total, wanted) < limit
    assert error(normed, wanted * torch.rsqrt(wanted.pow(2).mean() + norm.variance_epsilon)) < limit
    alone, same = norm_of(gpu, x, ChosenRows(y, weights, bias, chosen, experts), None)
    assert torch.equal(alone, total) and same is alone


class Routed(nn.Module):
    """A sum, its norm, and the choice of experts for it."""

    def __init__(self, width, centred):
        super().__init__()
        module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        facts = {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": True, "hidden_size": width}
        self.norm = nn.LayerNorm(width) if centred else module.Qwen3MoeRMSNorm(width)
        self.gate = module.Qwen3MoeTopKRouter(AutoConfig.for_model("qwen3_moe", **facts))
        for each in self.parameters():
            each.data = torch.randn(each.shape) * 0.1

    def forward(self, x, y):
        x = x + y
        z = self.norm(x)
        every, scores, _chosen = self.gate(z.view(-1, z.shape[-1]))
        return x + y, z * 1, every, scores


@on_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("width", [256, 2048, 2880, 4096, 8192])
@pytest.mark.parametrize("centred", [False, True])
def test_a_router_norms_the_token_that_waits(gpu, dtype, width, centred):
    torch.manual_seed(0)
    block = Routed(width, centred).to("cuda", dtype)
    gpus = {torch.device("cuda", 0): gpu}
    assert replace_norms(block, gpus) == 1 and replace_routers(block, gpus) == 1
    x, y = (torch.randn(1, 1, width, device="cuda", dtype=dtype) for _ in range(2))
    wanted = block(x, y)
    fused = FusedForward(block, torch.device("cuda", 0))
    with torch.inference_mode(), fused.recording():
        for _ in range(3):
            fused.begin()
            for a, b in zip(block(x, y), wanted, strict=True):
                assert error(a, b) < (1e-3 if dtype == torch.float16 else 4e-3)
    fused.close()


@on_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"), [(16, 8, 256), (32, 4, 128), (12, 2, 96), (8, 8, 64), (71, 1, 64), (8, 2, 32)]
)
@pytest.mark.parametrize("part", [1, 2, 4])  # of a head: all angles, those of one half, those of a quarter that turns alone
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("apart", [False, True])  # other numbers lie between the queries of two heads
def test_attention_turns_the_query_and_the_new_key(gpu, dtype, heads, kv_heads, dims, part, normed, apart):
    if part == 4 and dims // part % 16:
        pytest.skip("so few dimensions are not turned by attention")
    torch.manual_seed(2)
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    fused = FusedForward(nn.Linear(1, 1), torch.device("cuda", 0))
    norms = None
    if normed:
        both = nn.Sequential(*(module.LlamaRMSNorm(dims) for _ in range(2))).to("cuda", dtype)
        for each in both:
            each.weight.data = torch.rand(dims, device="cuda").to(dtype)
        replace_norms(both, {torch.device("cuda", 0): gpu})
        norms = both[0], both[1]
    angles = dims // part
    for before, shown in ((0, 64), (77, 128), (900, 1024)):
        q, new_key, new_value = (
            torch.randn(1, 1, count, dims, device="cuda", dtype=dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads)
        )
        if apart:
            q = torch.cat([q, torch.full_like(q, torch.nan)], -1)[..., :dims]
        cos, sin = (torch.randn(1, 1, angles, device="cuda", dtype=dtype) for _ in range(2))
        caches = [torch.randn(1, kv_heads, shown, dims, device="cuda", dtype=dtype) for _ in range(2)]
        found = []
        for later in (False, True):
            keys, values = (each.clone() for each in caches)
            keys.tokens_before = torch.tensor([before], device="cuda")
            fused.deferred.clear()
            deferred.use(fused.deferred if later else None)
            make = fused._rotate_later if later else fused._rotate
            turned, key = make(q, new_key, cos, sin, 0, norms)
            keys.new_token = key, new_value
            out = fused.decode(turned, keys, values, None, {"scaling": dims**-0.5})
            found.append((out, keys, values))
            if later:
                assert fused.deferred.what(turned, object) is not None  # it was never written
        limit = 2e-3 if dtype == torch.float16 else 8e-3
        assert all(error(a, b) < limit for a, b in zip(*found, strict=True))
        assert not torch.equal(found[1][1][:, :, before], caches[0][:, :, before])
        fused.deferred.write(turned)
        assert torch.equal(turned, fused._rotate(q, new_key, cos, sin, 0, norms)[0])
    deferred.use(None)
    fused.close()
