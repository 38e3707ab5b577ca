"""Prompts of thousands of tokens by cuDNN's attention, against torch's own. Skipped without a GPU."""

import time

import pytest
import torch
from test_cuda_step import SMALL, random_models

from gptq_webui.gptq.cuda import prompt
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.kv_pages import PagedMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LENGTHS = [3071, 3072, 3073, 3300, 3840, 4096]


@pytest.fixture
def step():
    torch.manual_seed(5)
    with torch.inference_mode():
        made = CudaStep(random_models.random_models(**{**SMALL, "group_size": 64}), 8192)
        yield made
        made.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_long_prompt_is_read_as_without_a_plan(step, monkeypatch, length):
    ids = torch.randint(0, step.shape.embedding_rows, (length + 300,), generator=torch.Generator().manual_seed(length)).tolist()
    found, asked = [], []
    allow = prompt.cudnn_attention
    monkeypatch.setattr(prompt, "cudnn_attention", lambda allowed: asked.append(allowed) or allow(allowed))
    for after in (10**9, 0):
        monkeypatch.setattr(prompt, "_PLAN_AFTER", after)
        assert not any(asked)
        memory = PagedMemory(step.pages)
        step.sequences.use(memory, length + 300)
        hidden = [step.prefill(ids[:length], 0).clone(), step.prefill(ids[length:], length).clone()]
        last = step.prefill(ids[:length], 0, ends=True).clone()
        assert float((last[0] - hidden[0][-1]).norm() / hidden[0][-1].norm()) < 2e-3
        found.append([*hidden, last])
    assert any(asked) == (length >= prompt._PLANNED)
    for plain, planned in zip(*found, strict=True):
        assert torch.isfinite(planned).all() and float((planned - plain).norm() / plain.norm()) < 2e-3


@pytest.mark.parametrize("length", [129, 200, 500, 769, 1500])
def test_weights_that_are_kept_dense_give_the_prompt_that_packed_ones_give(step, length):
    ids = torch.randint(0, step.shape.embedding_rows, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    step.sequences.use(PagedMemory(step.pages), 2000)
    plain = step.prefill(ids, 0).clone()
    assert step.prompt.dense.size_bytes == 0  # nobody has said how much conversations leave
    step.pages.limit_bytes = step.free_bytes() // 2
    step.prefill([3] * 1000, 0)
    most = step.prompt.dense.size_bytes
    assert most > 0
    for _ in range(2):
        found = step.prefill(ids, 0)
        assert torch.isfinite(found).all() and float((found - plain).norm() / plain.norm()) < 2e-3
    assert step.prompt.dense.size_bytes == most
    assert step.prompt.dense.free() and step.prompt.dense.size_bytes == 0
    again = step.prefill(ids, 0)
    assert float((again - plain).norm() / plain.norm()) < 2e-3


def test_a_prompt_of_a_new_length_waits_for_no_plan(step):
    """What cuDNN needs for one shape was most of a second where a single query was asked for."""
    step.sequences.use(PagedMemory(step.pages), 2000)
    times = []
    for length in (700, 811, 922, 1033, 1144):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step.prefill([3] * length, 0, ends=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    assert sorted(times)[2] < 0.1, times


@pytest.mark.parametrize("lengths", [(5, 40), (70, 129, 1), (512, 300, 700)])
def test_prompts_that_are_read_together_attend_each_to_its_own_tokens(step, lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(0, step.shape.embedding_rows, (each,), generator=generator).tolist() for each in lengths]
    wanted, following = [], [3] * 30
    for ids in prompts:
        step.sequences.use(PagedMemory(step.pages), len(ids) + 30)
        step.prefill(ids, 0, ends=True)
        wanted.append(step.prompt_logits.clone())
        step.prefill(following, len(ids))
        wanted.append(step.prompt_logits.clone())
    memories = [PagedMemory(step.pages) for _ in prompts]
    for memory, ids in zip(memories, prompts, strict=True):
        memory.reserve(len(ids) + 30)
    found = step.prefill_several(list(zip(memories, prompts, strict=True)), [True] * len(prompts))
    for at, (memory, ids) in enumerate(zip(memories, prompts, strict=True)):
        memory.length = len(ids)
        step.sequences.use(memory, len(ids) + 30)
        step.prefill(following, len(ids))
        for logits, plain in zip((found[at], step.prompt_logits), wanted[2 * at : 2 * at + 2], strict=True):
            assert float((logits - plain).norm() / plain.norm()) < 5e-3
