"""gptq/cuda: attention to latent vectors (MLA) on a GPU, against transformers' own forward in fp32."""

import importlib
import inspect
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_families import IDS, off, packed
from transformers import AutoConfig, DynamicCache

from gptq_webui.gptq.cuda import latent_attention
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.latent_attention import LatentAttention, is_latent, leave_masks_out
from gptq_webui.gptq.static_layers import StaticKeys
from gptq_webui.gptq.stepper_choice import stepper_for

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
LITE = {"num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
TINY = {"num_attention_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
CASES = {
    "v2 lite": ("deepseek_v2", {**LITE, "q_lora_rank": None}),
    "v2 tiny": ("deepseek_v2", {**TINY, "q_lora_rank": 64}),
    "v3 of 40 heads": ("deepseek_v3", {**LITE, "num_attention_heads": 40, "q_lora_rank": 96}),
    "v3 with halves turned": ("deepseek_v3", {**TINY, "q_lora_rank": None, "rope_interleave": False}),
}


@pytest.fixture(scope="module")
def gpu():
    made = Gpu(torch.device("cuda", 0))
    yield made
    made.close()


def module_of(kind, facts):
    """(an attention module in fp32, what gives its angles)."""
    own = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = AutoConfig.for_model(
        kind, hidden_size=256, num_key_value_heads=facts["num_attention_heads"], num_hidden_layers=1,
        max_position_embeddings=4096, **facts,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    name = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[kind]
    module = getattr(own, f"{name}Attention")(config, layer_idx=0).cuda().eval().requires_grad_(False)
    for each in module.parameters():
        each.data = torch.rand_like(each) + 0.5 if each.dim() == 1 else torch.randn_like(each) * each.shape[1] ** -0.5
    return module, getattr(own, f"{name}RotaryEmbedding")(config).cuda()


HALF, BFLOAT = torch.float16, torch.bfloat16


@needs_gpu
@pytest.mark.parametrize(
    ("case", "dtype", "shown"),  # tokens up to which one kernel computes all
    [
        ("v2 lite", HALF, 0), ("v2 lite", HALF, 1024), ("v2 lite", BFLOAT, 1024), ("v2 tiny", HALF, 1024), ("v2 tiny", BFLOAT, 0),
        ("v3 of 40 heads", HALF, 1024), ("v3 with halves turned", HALF, 0), ("v3 with halves turned", HALF, 1024),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_a_token_attends_as_its_module_computes_it(case, dtype, shown, gpu, monkeypatch):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 keeps the keys of each head")
    torch.manual_seed(len(case))
    monkeypatch.setattr(latent_attention, "_WHOLE_TOKENS", shown)
    module, rotary = module_of(*CASES[case])
    module.to(dtype).float()  # weights that the numbers hold
    attention = LatentAttention(gpu)
    assert is_latent(module)
    for before in (1, 16, 77, 900):
        x = torch.randn(1, before + 1, 256, device="cuda").to(dtype).float()
        positions = torch.arange(before + 1, device="cuda")[None]
        # a token sees all up to its own
        mask = torch.full((before + 1, before + 1), -torch.inf, device="cuda").triu(1)[None, None]
        wanted = module(x, attention_mask=mask, position_embeddings=rotary(x, positions), cache=None)[0][:, -1:]
        module.to(dtype)
        past = DynamicCache()
        small = x.to(dtype)
        angles = rotary(small[:, :before], positions[:, :before])
        module(
            small[:, :before], attention_mask=mask[..., :-1, :-1].to(dtype), position_embeddings=angles, **cache_of(module, past)
        )
        count = torch.tensor([before], device="cuda")
        static = StaticKeys(past.layers[0], 1024, count)
        static.keys[:, :, :before], static.values[:, :, :before] = past.layers[0].keys, past.layers[0].values
        static.keys[:, :, before:], static.values[:, :, before:] = torch.nan, torch.nan  # nothing else may be read
        token, last = small[:, before:], rotary(small[:, before:], positions[:, before:])

        def plain(token=token, last=last, static=static, before=before):
            seen = torch.where(torch.arange(1024, device="cuda") <= before, 0.0, -torch.inf).to(dtype)[None, None, None]
            static.keys[:, :, before + 1 :], static.values[:, :, before + 1 :] = 0, 0
            found = module(token, attention_mask=seen, position_embeddings=last, **cache_of(module, Cache(static)))
            static.keys[:, :, before + 1 :], static.values[:, :, before + 1 :] = torch.nan, torch.nan
            return found

        for _again in range(2):
            found = attention.of(module, token, Cache(static), last, plain)
            assert found is not None and found.shape == wanted.shape
            assert off(found[0], wanted[0]) < (4e-3 if dtype == torch.float16 else 3e-2)
        own = StaticKeys(past.layers[0], 1024, count)
        module(token, attention_mask=None, position_embeddings=last, **cache_of(module, Cache(own)))
        for ours, theirs in ((static.keys, own.keys), (static.values, own.values)):
            assert off(ours[0, 0, before : before + 1], theirs[0, 0, before : before + 1]) < (
                2e-3 if dtype == torch.float16 else 1e-2
            )
        module.float()
    assert bool(attention._work) == (shown == 0 or module.num_heads > 33)


class Cache:
    """A cache of one layer at fixed addresses."""

    def __init__(self, layer):
        self.layers = [layer]

    def update(self, keys, values, _layer, *_args, **_given):
        return self.layers[0].update(keys, values)


def cache_of(module, cache):
    """Under the name that the module's forward has for it."""
    forward = inspect.unwrap(type(module).forward)
    return {"cache" if "cache" in inspect.signature(forward).parameters else "past_key_values": cache}


@needs_gpu
@pytest.mark.parametrize(("kind", "changes"), [
    ("deepseek_v2", {"q_lora_rank": None}), ("deepseek_v3", {"q_lora_rank": 64}),
    ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
])  # fmt: skip
@torch.inference_mode()
def test_a_recorded_model_continues_as_its_dense_twin(kind, changes):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 keeps the keys of each head")
    changes = {
        **TINY,
        "hidden_size": 256,
        "max_position_embeddings": 512,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
    } | changes
    hf, twin = packed(kind, changes, act_order=False)
    hf = hf.half().cuda()
    stepper, note = stepper_for(hf, 512)
    assert stepper.kernel == "graph", note
    ids = (IDS * 12)[:60]
    wanted = twin(torch.tensor([ids])).logits[0].cuda()
    memory = stepper.begin()
    assert off(stepper.prefill(memory, ids[:20]), wanted[19:20]) < 2e-2
    errors = [off(stepper.step(memory, ids[at]), wanted[at : at + 1]) for at in range(20, 60)]
    assert sum(each > 2e-2 for each in errors) <= 2, errors  # where rounding chooses another expert
    kinds = stepper._fused._latent._kinds
    assert kinds and None not in kinds.values(), "attention was left to transformers"
    stepper.close()


def test_a_kind_that_failed_with_one_kernel_stays_with_three_after_another_passed(monkeypatch):
    def kind(rank, passes):
        return SimpleNamespace(
            kv_lora_rank=rank, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_heads=16, passes=passes, used=[],
            o_proj=lambda x: x,
        )  # fmt: skip

    def attend(module, x, layer, angles, kind):
        attention._matrices[id(module)] = x
        module.used.append(kind.in_one)
        return x if module.passes or not kind.in_one else x + 1

    x, keys = torch.ones(1, 1, 8, dtype=HALF), torch.zeros(1, 1, 4, 8)
    gpu = SimpleNamespace(add_missing=lambda variants: None, capability=(9, 0), shared_limit_bytes=227 * 1024, processors=132)
    attention, layer = LatentAttention(gpu), SimpleNamespace(keys=keys, values=keys.clone(), count=torch.tensor([1]))
    monkeypatch.setattr(attention, "_layer", lambda *_given: layer)
    monkeypatch.setattr(attention, "_attend", attend)
    monkeypatch.setattr(latent_attention, "capturing", lambda: False)
    fails, passes = kind(256, False), kind(512, True)
    for module in (fails, passes, fails, passes):
        found = attention.of(module, x, None, torch.zeros(32, dtype=torch.complex64), lambda: (x, None))
        assert torch.equal(found, x)
    assert fails.used == [True, False, False, False] and passes.used == [True, True, True]


def test_no_mask_is_made_once_every_attention_is_computed_here(monkeypatch):
    class Latent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for each in latent_attention._PARTS:
                setattr(self, each, None)
            self.q_proj = torch.nn.Identity()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Latent() for _ in range(2))
            self.config = SimpleNamespace(num_hidden_layers=2)

    def original(*_given):
        return "mask"

    own = sys.modules[__name__]
    monkeypatch.setattr(own, "create_causal_mask", original, raising=False)
    model, attention = Model(), LatentAttention(None)
    with ExitStack() as undo:
        leave_masks_out(model, attention, undo)
        assert own.create_causal_mask() == "mask"
        attention.computed(model.layers[0], True)
        assert own.create_causal_mask() == "mask"
        attention.computed(model.layers[1], False)  # its own forward has a mask
        attention.computed(model.layers[1], True)
        assert own.create_causal_mask() is None
        with pytest.raises(RuntimeError, match="differs"):
            attention.computed(model.layers[0], False)
        attention.end()
        assert own.create_causal_mask() == "mask"
    assert own.create_causal_mask is original
    with ExitStack() as undo:
        model.config.num_hidden_layers = 3  # one of another kind
        leave_masks_out(model, attention, undo)
        assert own.create_causal_mask is original
