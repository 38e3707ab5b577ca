"""Packed weights multiplied out again, some outputs at a time: what a gradient needs of them (tiles.py has their layout)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cpu_kernels
from .cpu_weights import Weights
from .numba_compiler import compiled
from .thread_team import Team
from .tiles import ISAS, LANES

_COLUMNS_BYTES = 64 << 20  # of the fp32 weights that are there at a time


@compiled
def multiply_out(
    tid: int,
    threads: int,
    counters: int,
    w: Any,
    scales: Any,
    zeros: Any,
    taken: Any,
    order: Any,
    kind: int,
    first: int,
    out: Any,
) -> None:
    """Tiles first … of w int32 [T][C][P/F][16] into out fp32 [K, 16 * tiles]: scale * (integer - zero).

    Row k of a tile is row taken[k] of out, none for -1; scales and zeros fp32 [T][C][16]. `order` is that of the
    instruction set; `kind` the bits of a number.
    """
    pieces = 8 // kind
    factor = 4 * pieces
    mask = np.int32(2**kind - 1)
    for t in cpu_kernels.shares(counters, 0, out.shape[1] // 16):
        for c in range(w.shape[1]):
            scale, zero = scales[first + t, c], zeros[first + t, c]
            for block in range(w.shape[2]):
                words = w[first + t, c, block]
                start = (c * w.shape[2] + block) * factor
                for at in range(factor):
                    k = taken[start + 4 * (at // 4) + order[at % 4]]
                    if k < 0:
                        continue
                    shift = np.int32(8 * (at % 4) + kind * (at // 4))
                    for n in range(16):
                        out[k, 16 * t + n] = (np.float32((words[n] >> shift) & mask) - zero[n]) * scale[n]


def columns_of(weights: Weights, team: Team) -> Iterator[tuple[int, int, Tensor]]:
    """(first output, last, fp32 [K, n]) of packed weights, from the first output to the last. The tensor is overwritten."""
    assert weights.scales is not None and weights.zeros is not None
    packed: Any = weights.w.view(np.int32).reshape(weights.tiles, weights.chunks, -1, LANES)
    scales, zeros = weights.scales.astype(np.float32), weights.zeros.astype(np.float32)
    rows = weights.chunks * weights.chunk_rows
    taken = weights.order
    if taken is None:
        taken = np.where(np.arange(rows) < weights.inputs, np.arange(rows), -1).astype(np.int32)
    order = np.array(ISAS[cpu_kernels.ISA].order, np.int64)
    step = max(1, _COLUMNS_BYTES // (4 * LANES * weights.inputs))
    for first in range(0, weights.tiles, step):
        tiles = min(step, weights.tiles - first)
        out = np.empty((weights.inputs, tiles * LANES), np.float32)
        team.run(1, multiply_out, packed, scales, zeros, taken, order, weights.kind, first, out)
        start = first * LANES
        end = min(start + tiles * LANES, weights.outputs)
        yield start, end, torch.from_numpy(out)[:, : end - start]
