"""Attention of one new token a row (attention.cu): where its blocks leave their parts, and how it is launched."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cuda_kernels import ATTENTION_THREADS, MOST_SPLITS, Attention, pointer
from .cuda_layers import Layer

if TYPE_CHECKING:
    from .cuda_step import CudaStep


class AttentionWork:
    """Where the blocks of an attention leave their parts, for up to so many rows."""

    def __init__(self, step: "CudaStep", rows: int) -> None:
        self._blocks = step.kv_heads * step.group_blocks
        self._processors = step.gpu.processors
        parts = max(self.splits(each) * each for each in range(1, rows + 1)) * self._blocks
        self.partial = torch.zeros(parts * 8 * (step.head_dim + 4), dtype=torch.float32, device=step.device)
        self.done = torch.zeros(rows * self._blocks, dtype=torch.int32, device=step.device)

    def splits(self, rows: int) -> int:
        """Blocks that share one conversation's keys: two of all rows together on a processor, which is what fits at once."""
        return max(1, min(MOST_SPLITS, 2 * self._processors // (self._blocks * rows)))


def attend(step: "CudaStep", at: int, layer: Layer, qkv: Tensor, out: Tensor, work: AttentionWork, rows: int = 1) -> None:
    """qkv [rows, (heads + 2 kv heads) * D] of the tokens at `positions` -> out [rows, padded], in o's order.

    `at` is the number of the layer.
    """
    arguments = Attention(
        pointer(qkv),
        pointer(step.table),
        pointer(step.positions),
        pointer(step.cosines),
        pointer(step.sines),
        pointer(layer.q_norm),
        pointer(layer.k_norm),
        pointer(out),
        pointer(layer.o.permutation),
        pointer(work.partial),
        pointer(work.done),
        at * step.pages.layer_bytes,
        step.heads,
        step.kv_heads,
        step.max_pages,
        out.shape[-1],
        layer.window,
        step.rotary_half,
        step.group_blocks,
        step.eps,
        math.log2(math.e) / math.sqrt(step.head_dim),
    )
    grid = (work.splits(rows), step.kv_heads * step.group_blocks, rows)
    step.gpu.run(f"attention_{step.cache.name}", grid, ATTENTION_THREADS, arguments, overlap=True)
