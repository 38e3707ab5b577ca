"""gptq/cuda: one token of a gated delta rule (Qwen3-Next, Qwen3.5, OLMo Hybrid), against transformers' own forward."""

import importlib
import inspect

import emulated_states
import pytest
import torch
from test_families import off
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache

from gptq_webui.gptq.cuda import deferred, delta_rule
from gptq_webui.gptq.cuda.delta_rule import DeltaRule
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kept_states import Kept
from gptq_webui.gptq.cuda.kernel_source import DeltaVariant

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
HALF, BFLOAT = torch.float16, torch.bfloat16
CLASSES = {
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen4_exp_text": "Qwen4ExpTextGatedDeltaNet",
}
# heads, heads of keys, dimensions of a key and of a value, width of the convolution
SIZES = {
    "next": (32, 16, 128, 128, 4), "one head each": (4, 4, 64, 96, 4), "tiny": (4, 2, 16, 16, 4), "wide": (12, 4, 256, 256, 3),
    "of eight": (8, 1, 32, 8, 8), "long values": (6, 2, 96, 192, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def gpu():
    made = Gpu(torch.device("cuda", 0))
    yield made
    made.close()


def module_of(kind, size, device, **changes):
    """(a module of linear attention in fp32, an empty cache for it)."""
    own = "".join(kind.rsplit("_text", 1))
    if kind not in CONFIG_MAPPING or kind not in CLASSES:
        pytest.skip("this transformers has no such architecture")
    heads, key_heads, dk, dv, width = SIZES[size]
    config = AutoConfig.for_model(
        kind, hidden_size=256, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=heads, linear_num_key_heads=key_heads, linear_key_head_dim=dk, linear_value_head_dim=dv,
        linear_conv_kernel_dim=width, **changes,
    )  # fmt: skip
    source = importlib.import_module(f"transformers.models.{own}.modeling_{own}")
    module = getattr(source, CLASSES[kind])(config, layer_idx=0).to(device).eval().requires_grad_(False)
    for name, each in module.named_parameters():
        if each.dim() == 1:
            each.data = torch.rand_like(each) * 2 - (1 if name in ("A_log", "dt_bias") else 0)
        else:
            each.data = torch.randn_like(each) * each[0].numel() ** -0.5
    cache = DynamicCache(config=config)
    if not hasattr(cache, "layers") or not hasattr(cache.layers[0], "conv_states"):
        pytest.skip("this transformers keeps such states elsewhere")
    return module, cache


def through(module, x, cache):
    """What a module gives, which has its own name for the cache."""
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return module(x, **{next(each for each in ("cache", "cache_params", "past_key_values") if each in names): cache})


def states(cache):
    layer = cache.layers[0]
    return [next(iter(each.values())) if isinstance(each, dict) else each for each in (layer.conv_states, layer.recurrent_states)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CLASSES)
@torch.inference_mode()
def test_the_kernel_is_given_what_the_module_computes(kind, size, monkeypatch):
    class Computes:
        capability, processors, shared_limit_bytes = (8, 0), 100, 1 << 16

        def run(self, _name, _grid, _threads, arguments, *_args, **_given):
            emulated_states.delta_rule(**arguments)

    monkeypatch.setattr(delta_rule.DELTA, "pack", lambda **given: given)
    torch.manual_seed(0)
    module, cache = module_of(kind, size, "cpu")
    x = torch.randn(1, 30, 256)
    through(module, x[:, :29], cache)
    inputs, state = states(cache)
    kept = Kept(inputs.clone(), state.clone())
    rule = DeltaRule(Computes())
    assert rule.takes(module) and not rule.takes(module.conv1d)
    variant = rule._variant(module, torch.float32, kept)
    assert variant is not None and not variant.kernel.cluster
    found = rule._compute(module, x[:, 29:], kept, variant)
    wanted = through(module, x[:, 29:], cache)
    assert off(found, wanted) < 1e-4
    assert torch.equal(kept.inputs, states(cache)[0]) and off(kept.state, states(cache)[1]) < 1e-4
    wait_for_reading(monkeypatch, module, variant.layers)
    again = Kept(*(each.clone() for each in states(cache)))
    rule._compute(module, x[:, 28:29], again, variant)
    assert torch.isfinite(again.state).all() and torch.isfinite(again.inputs).all()


def wait_for_reading(monkeypatch, module, layers):
    """What these layers of a module give is written when something asks for it, as where an adapter adds to it."""
    waiting = deferred.Deferred()
    monkeypatch.setattr(deferred._current, "deferred", waiting)

    def later(_module, _args, y):
        held = torch.full_like(y, float("nan"))
        waiting.defer([held], (y,), None, lambda: held.copy_(y))
        return held

    for each in layers:
        getattr(module, each).register_forward_hook(later)


@needs_gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("cluster", [True, False])
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("qwen3_next", each) for each in SIZES), ("qwen3_5_text", "next"), ("qwen3_5_text", "wide"),
        ("olmo_hybrid", "long values"), ("olmo_hybrid", "tiny"), ("qwen4_exp_text", "next"),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_tokens_are_computed_and_kept_as_the_module_does(kind, size, cluster, dtype, gpu, monkeypatch):
    if cluster and gpu.capability < (9, 0):
        pytest.skip("this GPU has no clusters")
    if not cluster:
        monkeypatch.setattr(delta_rule, "HOPPER", (99, 0))
    torch.manual_seed(len(size))
    module, cache = module_of(kind, size, "cuda")
    module.to(dtype).float()  # weights that the numbers hold
    x = torch.randn(1, 50, 256, device="cuda").to(dtype).float()
    wanted = through(module, x, cache)[:, 30:]
    kept_wanted = [each.clone() for each in states(cache)]
    module.to(dtype)
    rule, (_module, own), (_module, plain) = DeltaRule(gpu), module_of(kind, size, "cuda"), module_of(kind, size, "cuda")
    small = x.to(dtype)
    for each in (own, plain):
        through(module, small[:, :30], each)
    found, theirs = [], []
    for at in range(30, 50):
        token = small[:, at : at + 1]
        y = rule.of(module, token, own, lambda token=token: through(module, token, own))
        assert y is not None, rule._right
        found.append(y)
        theirs.append(through(module, token, plain))
    assert off(torch.cat(found, 1), wanted) < 1.5 * off(torch.cat(theirs, 1), wanted) + 1e-3
    for mine, other in zip(states(own), kept_wanted, strict=True):
        assert float((mine.float() - other.float()).norm() / other.float().norm()) < (2e-3 if dtype == HALF else 1e-2)
    assert list(rule._right.values()) == [True] and next(iter(rule._right))[1].kernel.cluster == (cluster and SIZES[size][3] > 32)


@needs_gpu
@torch.inference_mode()
def test_a_module_that_computes_something_else_is_left_alone(gpu):
    module, cache = module_of("qwen3_next", "tiny", "cuda")
    module.to(HALF)
    x = torch.randn(1, 9, 256, device="cuda", dtype=HALF)
    through(module, x[:, :8], cache)
    before = [each.clone() for each in states(cache)]
    rule = DeltaRule(gpu)
    assert rule.of(module, x[:, 8:], cache, lambda: through(module, x[:, 8:], cache) * 1.1) is None
    assert all(torch.equal(a, b) for a, b in zip(states(cache), before, strict=True)), "what is kept has changed"
    module.norm.activation = "tanh"
    assert DeltaRule(gpu).of(module, x[:, 8:], cache, lambda: through(module, x[:, 8:], cache)) is None
    module.norm.activation = "silu"
    assert rule.of(module, x, cache, lambda: through(module, x, cache)) is None, "several tokens"
    found = DeltaRule(gpu).of(module, x[:, 8:], cache, lambda: through(module, x[:, 8:], cache))
    assert off(found, through(module, x[:, 8:], cache_with(cache, before))) < 5e-3


def cache_with(cache, kept):
    for each, old in zip(states(cache), kept, strict=True):
        each.copy_(old)
    return cache


def test_a_block_of_the_kernel_takes_columns_that_a_warp_reads_whole():
    rule = DeltaRule(type("Any", (), {"capability": (9, 0), "shared_limit_bytes": 1 << 16})())

    def variant(dk, dv):
        norm = type("Norm", (), {"weight": torch.ones(dv, dtype=HALF)})
        module = type("Module", (), {
            "num_v_heads": 2, "num_k_heads": 1, "head_k_dim": dk, "head_v_dim": dv, "A_log": torch.ones(2),
            "dt_bias": torch.ones(2), "in_proj_qkvz": None, "in_proj_ba": None, "out_proj": None, "norm": norm,
        })  # fmt: skip
        found = rule._variant(module, HALF, Kept(torch.empty(1, 1, 4), torch.empty(1)))
        return found and found.kernel

    assert variant(128, 128) == DeltaVariant(False, 128, 128, 32, 4, True)
    assert variant(64, 512) == DeltaVariant(False, 64, 512, 64, 4, True)
    assert variant(64, 8) == DeltaVariant(False, 64, 8, 8, 4, False)
    for refused in ((512, 128), (128, 100), (36, 128), (128, 1024)):
        assert variant(*refused) is None
