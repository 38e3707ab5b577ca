"""Attention of many rows by blocks that stay, against the kernel of a few rows. Skipped without a GPU of Hopper or newer."""

import pytest
import torch
from test_cuda_step import SMALL, random_models

from gptq_webui.gptq.cuda import attention
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kv_pages import PagedMemory

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with a copy engine"
)
LENGTHS = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 512, 700, 1500, 2040, *range(3, 900, 7)]


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "change",
    [{}, {"head_dim": 128}, {"head_dim": 96}, {"head_dim": 32}, {"window": 100}, {"qk_norm": True}, {"heads": 24, "kv_heads": 2}],
    ids=str,
)
def test_many_rows_attend_and_keep_their_token_as_a_few_do(gpu, monkeypatch, change):
    torch.manual_seed(5)
    with torch.inference_mode():
        step = CudaStep(
            random_models.random_models(**{**SMALL, "group_size": 64, **change}), 2048, parallel=len(LENGTHS), gpu=gpu
        )
        memories = [PagedMemory(step.pages) for _ in LENGTHS]
        for row, (memory, length) in enumerate(zip(memories, LENGTHS, strict=True)):
            step.sequences.use(memory, length + 1, row)
        for slab in step.pages._slabs.values():
            slab.view(torch.float16).normal_()
        before = {at: slab.clone() for at, slab in step.pages._slabs.items()}
        for rows in (17, len(LENGTHS)):
            step.sequences.positions[: len(LENGTHS)] = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
            step.sequences.positions[rows - 2] = -1  # an idle row
            qkv = torch.randn(rows, step.shape.qkv_width, device="cuda").half()
            found = []
            for least in (rows + 1, rows, rows):
                monkeypatch.setattr(attention, "_LEAST_PAGED_ROWS", least)
                for at, slab in before.items():
                    step.pages._slabs[at].copy_(slab)
                out = torch.zeros(rows, step.weights.layers[0].o.padded, dtype=torch.float16, device="cuda")
                attention.attend(gpu, step.shape, step.weights, 1, step.sequences, step.batch._work, qkv=qkv, out=out)
                found.append((out.double(), {at: slab.clone() for at, slab in step.pages._slabs.items()}))
            (plain, kept), (paged, also_kept), (again, _kept) = found
            assert float((paged - plain).norm() / plain.norm()) < 1e-3
            assert torch.equal(paged, again), "the same bits in every launch"
            assert all(torch.equal(slab, also_kept[at]) for at, slab in kept.items())
        step.close()
