"""gptq/cuda: one token of a selective state space (Mamba 2), against transformers' own forward."""

from types import SimpleNamespace

import pytest
import torch
from emulated_states import gated_norm, scan_token
from every_architecture import tiny_model
from test_cuda_delta_rule import states, through, wait_for_reading
from test_families import off
from transformers import CONFIG_MAPPING, DynamicCache

from gptq_webui.gptq.cuda import state_space
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kept_states import Kept
from gptq_webui.gptq.cuda.state_space import StateSpace

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
HALF, BFLOAT = torch.float16, torch.bfloat16
KINDS = {
    "bamba": ("bamba", {}),
    "bamba of its own size": ("bamba", {"hidden_size": 256, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 128}),
    "bamba of two groups": ("bamba", {"mamba_n_groups": 2}),
    "bamba of short steps": ("bamba", {"time_step_limit": (0.01, 0.1)}),
    "long states in parts": ("bamba", {"hidden_size": 256, "mamba_n_heads": 4, "mamba_d_head": 128, "mamba_d_state": 256}),
    "granite": ("granitemoehybrid", {}),
    "falcon h1": ("falcon_h1", {}),
    "falcon h1 with a norm": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    "falcon h1 with a late norm": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "nemotron": ("nemotron_h", {}),
    "mamba 2": ("mamba2", {}),
    "zamba 2": ("zamba2", {}),
}


@pytest.fixture(scope="module")
def gpu():
    made = Gpu(torch.device("cuda", 0))
    yield made
    made.close()


def module_of(name, rule, device):
    """(the first layer of this kind of a model in fp32, what makes an empty cache, the width of its input)."""
    kind, changes = KINDS[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such architecture")
    model = tiny_model(kind, **changes).to(device).eval().requires_grad_(False)
    module = next(each for each in model.modules() if rule.takes(each))
    for own, each in module.named_parameters():
        if own == "dt_bias":
            each.data = torch.linspace(-12, 4, each.numel(), device=each.device)  # some steps are too short, or too long
        elif own in ("A_log", "D"):
            each.data = torch.rand_like(each) * 2 - 1
        elif each.dim() == 1:
            each.data = torch.rand_like(each) + (0.5 if "norm" in own else -0.5)
    layers = getattr(DynamicCache(config=model.config), "layers", None)
    if not layers or not hasattr(layers[module.layer_idx], "conv_states"):
        pytest.skip("this transformers keeps such states elsewhere")
    return module, lambda: DynamicCache(config=model.config), model.config.hidden_size


def kept_of(module, cache):
    return states(SimpleNamespace(layers=[cache.layers[module.layer_idx]]))


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_the_kernels_are_given_what_the_module_computes(name, monkeypatch):
    class Computes:
        capability, processors = (8, 0), 100

        def run(self, kernel, _grid, _threads, arguments, *_args, **_given):
            (gated_norm if kernel.startswith("gated_norm") else scan_token)(**arguments)

    for each in (state_space.SCAN, state_space.GATED_NORM):
        monkeypatch.setattr(each, "pack", lambda **given: given)
    torch.manual_seed(0)
    rule = StateSpace(Computes())
    module, make, width = module_of(name, rule, "cpu")
    cache = make()
    assert not rule.takes(module.conv1d)
    x = torch.randn(1, 30, width)
    through(module, x[:, :29], cache)
    kept = Kept(*(each.clone() for each in kept_of(module, cache)))
    variant = rule._variant(module, torch.float32, kept)
    assert variant is not None and variant.kernel.dims * variant.kernel.state <= 8192
    own = Kept(*kept_of(module, cache))
    steps = rule._steps_of(module, own, lambda: through(module, x[:, 29:], cache))
    assert steps is not None and all(torch.equal(a, b) for a, b in zip(own, kept, strict=True))
    rule._steps[type(module), *state_space._settings_of(module)] = steps
    found = rule._compute(module, x[:, 29:], kept, variant)
    wanted = through(module, x[:, 29:], cache)
    assert off(found, wanted) < 1e-4
    assert torch.equal(kept.inputs, kept_of(module, cache)[0]) and off(kept.state, kept_of(module, cache)[1]) < 1e-4
    wait_for_reading(monkeypatch, module, ["in_proj"])
    again = Kept(*(each.clone() for each in kept))
    rule._compute(module, x[:, 28:29], again, variant)
    assert torch.isfinite(again.state).all() and torch.isfinite(again.inputs).all()


@pytest.mark.parametrize("name", ["bamba", "granite", "nemotron"])
@torch.inference_mode()
def test_a_trial_that_fails_leaves_the_module_and_what_it_keeps(name):
    rule = StateSpace(SimpleNamespace(capability=(8, 0), processors=100))
    module, make, width = module_of(name, rule, "cpu")
    cache = make()
    through(module, torch.randn(1, 9, width), cache)
    kept, bias = Kept(*kept_of(module, cache)), module.dt_bias.detach().clone()
    before = [each.clone() for each in kept]

    def full():
        kept.inputs.fill_(1)
        raise torch.OutOfMemoryError("out of memory")

    for tried in (rule._steps_of, lambda *args: super(StateSpace, rule)._try(args[0], None, *args[1:2], None, args[2])):
        with pytest.raises(torch.OutOfMemoryError):
            tried(module, kept, full)
        assert torch.equal(module.dt_bias, bias)
        assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(
    "name", [each for each in KINDS if each != "falcon h1 with a late norm"]
)  # a token has another shape there
@torch.inference_mode()
def test_tokens_are_computed_and_kept_as_the_module_does(name, dtype, gpu):
    torch.manual_seed(len(name))
    rule = StateSpace(gpu)
    module, make, width = module_of(name, rule, "cuda")
    module.to(dtype).float()  # weights that the numbers hold
    x = torch.randn(1, 50, width, device="cuda").to(dtype).float()
    cache, own, plain = make(), make(), make()
    wanted = through(module, x, cache)[:, 30:]
    module.to(dtype)
    small, found, theirs = x.to(dtype), [], []
    for each in (own, plain):
        through(module, small[:, :30], each)
    for at in range(30, 50):
        token = small[:, at : at + 1]
        y = rule.of(module, token, own, lambda token=token: through(module, token, own))
        assert y is not None, rule._right
        found.append(y)
        theirs.append(through(module, token, plain))
    assert off(torch.cat(found, 1), wanted) < 1.5 * off(torch.cat(theirs, 1), wanted) + (1e-3 if dtype == HALF else 8e-3)
    for mine, torchs, wanted in zip(*(kept_of(module, each) for each in (own, plain, cache)), strict=True):
        mine, torchs = (float((each.float() - wanted).norm() / wanted.norm()) for each in (mine, torchs))
        assert mine < 1.5 * torchs + (1e-3 if dtype == HALF else 8e-3)
    assert list(rule._right.values()) == [True]
