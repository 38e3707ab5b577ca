"""gptq/cuda/prompt_attention.py: attention of prompts on a GPU, and what it leaves to torch. The first need a GPU."""

import emulated_gpu
import pytest
import torch

from gptq_webui.gptq.cuda.prompt_attention import PromptAttention

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def given(rows, keys, heads, kv_heads, dims, dtype, device):
    generator = torch.Generator(device).manual_seed(rows + dims)
    shapes = ((1, rows, heads, dims), (1, keys, kv_heads, dims), (1, keys, kv_heads, dims))
    return [torch.randn(each, generator=generator, device=device).to(dtype).transpose(1, 2) for each in shapes]


def mask_of(rows, keys, window, dtype, device, more=0):
    row, key = torch.arange(rows, device=device)[:, None] + keys - rows, torch.arange(keys, device=device)[None]
    sees = (key <= row) & (key > row - (window or keys)) | (key < more)
    if dtype == torch.bool:
        return sees[None, None]
    return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def attended(q, k, v, mask, scaling, softcap=None, sinks=None):
    """In fp64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(-1, -1, q.shape[2], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


CASES = [  # window, cap, sinks, keys at the beginning that all see, the mask's numbers
    (None, None, False, 0, torch.bool),
    (None, 30.0, False, 0, None),
    (33, None, True, 0, None),
    (128, 50.0, True, 5, torch.bool),
    (None, None, True, 3, torch.float32),
]


@on_a_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [16, 64, 80, 128, 256])
def test_a_prompt_attends_as_in_fp64(dims, dtype, case):
    window, cap, with_sinks, more, numbers = case
    attention = PromptAttention(torch.nn.Module(), torch.device("cuda", 0))
    for rows, keys in ((2, 2), (7, 40), (129, 129), (200, 777)):
        q, k, v = given(rows, keys, 6, 2, dims, dtype, "cuda")
        mask = mask_of(rows, keys, window, numbers or dtype, "cuda", more)
        sinks = torch.linspace(-2, 2, 6, device="cuda").to(dtype) if with_sinks else None
        found = attention.decode(q, k, v, mask, {"scaling": 0.2, "softcap": cap, "sliding_window": window, "s_aux": sinks})
        wanted = attended(q, k, v, mask, 0.2, cap, sinks)
        assert float((found.double() - wanted).norm() / wanted.norm()) < (1e-3 if dtype == torch.float16 else 8e-3)
    attention.close()


@pytest.fixture
def attention(monkeypatch):
    emulated_gpu.emulate(monkeypatch)
    return PromptAttention(torch.nn.Module(), torch.device("cpu"))


def test_a_mask_is_compared_once_for_all_layers(attention, monkeypatch):
    launched, plain = [], emulated_gpu.Gpu.run
    monkeypatch.setattr(
        emulated_gpu.Gpu, "run", lambda self, name, *rest, **more: launched.append(name) or plain(self, name, *rest, **more)
    )
    q, k, v = given(20, 30, 4, 2, 32, torch.float16, "cpu")
    for window, more in ((None, 0), (5, 0), (None, 4)):
        mask = mask_of(20, 30, window, torch.float16, "cpu", more)
        launched.clear()
        with attention.reading():
            for _layer in range(3):
                found = attention.decode(q, k, v, mask, {"scaling": 0.2, "sliding_window": window})
                wanted = attended(q, k, v, mask, 0.2)
                assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-3
        assert launched == ["compare_mask_half_32", *["prompt_attention_half_32"] * 3]
        assert not attention._compared


def test_what_torch_attends_as_fast_is_left_to_it(attention):
    q, k, v = given(20, 20, 4, 2, 32, torch.float16, "cpu")
    mask = mask_of(20, 20, None, torch.float16, "cpu")
    plain = {"scaling": 0.2}
    assert attention.decode(q, k, v, mask, plain) is not None
    assert attention.decode(q, k, v, None, plain) is None, "no mask: torch's own causal attention"
    assert attention.decode(q[:, :, :1], k, v, mask[:, :, :1], plain) is None, "one token"
    assert attention.decode(q, k, v, mask.expand(-1, 4, -1, -1), plain) is None, "numbers for each head"
    assert attention.decode(q, k, v, mask, {**plain, "position_bias": mask}) is None, "what is not known"
    assert attention.decode(q.float(), k.float(), v.float(), mask, plain) is None
    assert attention.decode(q, k, v[..., :16], mask, plain) is None, "values of another width"
    assert attention.decode(*(each[..., :24] for each in (q, k, v)), mask, plain) is None, "what the matrix unit does not take"
