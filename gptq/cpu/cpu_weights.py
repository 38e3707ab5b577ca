"""Weights in the layouts of the compiled kernels (tiles.py), made from a GPTQLinear or a dense Linear.

Integers keep their bits (3 bits are stored in 4). Every chunk of at most 128 rows has its scales and zeros. Nothing is
rounded: a dense layer is stored in the shortest type that holds each of its numbers exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import bit_packing
from ..gptq_linear import GPTQLinear
from . import cpu_kernels
from .thread_team import Team
from .tiles import ISAS, LANES, UNIT
from .weight_room import aligned

CHUNK_ROWS = 128
_CACHED_ROWS = 512  # of a dense weight at once: what is made of them stays in the processor's cache
Zeros = Callable[[tuple[int, ...], Any], np.ndarray]  # room for an array, as `aligned` gives it
HALF, BFLOAT16, FLOAT = 16, 17, 32  # `kind` of a dense weight; that of a packed one is its bits


@dataclass(frozen=True)
class Weights:
    """y [N] = x [K] W + bias."""

    kind: int  # bits (2, 4, 8), or HALF, BFLOAT16, FLOAT
    inputs: int  # K
    outputs: int  # N
    chunks: int  # C; 0 if dense
    chunk_rows: int  # P
    w: np.ndarray  # bytes, at an address that 64 divides
    scales: np.ndarray | None  # half [T][C][16]
    zeros: np.ndarray | None  # uint8 [T][C][16]
    order: np.ndarray | None  # int32 [C * P]: the input of each row, -1 for none; None: inputs 0 to K - 1 in order
    bias: np.ndarray | None  # fp32 [N]
    error: float = 0.0  # of the stored weights, relative to the largest of each chunk

    @property
    def tiles(self) -> int:
        return -(-self.outputs // LANES)

    @property
    def size_bytes(self) -> int:
        return sum(each.nbytes for each in (self.w, self.scales, self.zeros, self.order, self.bias) if each is not None)


def from_packed(linear: GPTQLinear, isa: str, team: Team, columns: Tensor | None = None, allocate: Zeros = aligned) -> Weights:
    """The same integers, zeros and scales. Only scales that are no halves are rounded; `error` says by how much."""
    zeros = bit_packing.true_zeros(linear.qzeros, linear.bits, linear.out_features, linear.checkpoint_format).numpy()  # [G, N]
    groups = linear.g_idx.long().numpy()  # [K]
    bias = None if linear.bias is None else linear.bias.detach().float().numpy()
    words, scales = linear.qweight.detach().numpy(), linear.scales.detach()
    if columns is not None:
        at = columns.numpy()
        words, zeros, scales, bias = words[:, at], zeros[:, at], scales[:, columns], None if bias is None else bias[at]
    return _packed(words, zeros, scales, groups, linear.bits, bias, isa, team, allocate)


def _packed(
    words: np.ndarray,
    zeros: np.ndarray,
    scales: Tensor,
    groups: np.ndarray,
    bits: int,
    bias: np.ndarray | None,
    isa: str,
    team: Team,
    allocate: Zeros,
) -> Weights:
    rows, columns = len(groups), words.shape[1]
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups, minlength=len(zeros))
    longest = int(counts.max())
    pieces = math.ceil(longest / CHUNK_ROWS)
    chunk_rows = math.ceil(longest / pieces / UNIT) * UNIT
    table: list[np.ndarray] = []  # the rows of each chunk, -1 where there is none
    owner: list[int] = []  # its group
    start = 0
    for group, count in enumerate(counts):
        mine = order[start : start + count]
        start += count
        for at in range(0, count, chunk_rows):
            padded = np.full(chunk_rows, -1, np.int64)
            piece = mine[at : at + chunk_rows]
            padded[: len(piece)] = piece
            table.append(padded)
            owner.append(group)
    taken = np.concatenate(table)  # [C * P]
    chunks = len(table)
    kind = 4 if bits == 3 else bits
    tiles = -(-columns // LANES)
    w = allocate((tiles, chunks, chunk_rows * kind // 32, LANES, 4), np.uint8)
    team.run(1, cpu_kernels.arrange, np.ascontiguousarray(words), bits, taken, np.array(ISAS[isa].order, np.int64), kind, w)
    full = tiles * LANES - columns
    halves = scales.to(torch.float16)
    error = float(((halves.float() - scales.float()).abs() / scales.float().abs().clamp(min=1e-30)).max())
    s = allocate((tiles, chunks, LANES), np.float16)
    s[...] = np.pad(halves.numpy()[owner], ((0, 0), (0, full))).reshape(chunks, tiles, LANES).transpose(1, 0, 2)
    z = allocate((tiles, chunks, LANES), np.uint8)
    z[...] = np.pad(zeros[owner], ((0, 0), (0, full))).reshape(chunks, tiles, LANES).transpose(1, 0, 2)
    plain = np.array_equal(taken, np.arange(rows))
    return Weights(
        kind, rows, columns, chunks, chunk_rows, w.reshape(-1), s, z, None if plain else taken.astype(np.int32), bias, error
    )


def from_dense(weight: Tensor, bias: Tensor | None, isa: str, team: Team, allocate: Zeros = aligned) -> Weights:
    """From weight [N, K]: in 8 bits with a scale for every 32 numbers, if that loses nothing (embeddings that came from
    an 8-bit file); else in the shortest of half, bfloat16 and fp32 that holds every number."""
    weight = weight.detach()
    offset = None if bias is None else bias.detach().float().numpy()
    eight = _as_eight_bits(weight)
    if eight is not None:
        q, scales, error = eight
        zeros = np.full(scales.shape, 128, np.uint8)
        groups = np.arange(weight.shape[1]) // 32
        words = q.reshape(-1, 4, q.shape[1]).transpose(0, 2, 1).copy().view(np.int32)[..., 0]  # [K/4, N]
        found = _packed(words, zeros, scales, groups, 8, offset, isa, team, allocate)
        return Weights(**{**vars(found), "error": error})
    kind, stored = HALF, weight.to(torch.float16)
    if not torch.equal(stored.to(weight.dtype), weight):
        kind, stored = BFLOAT16, weight.to(torch.bfloat16)
        if not torch.equal(stored.to(weight.dtype), weight):
            kind, stored = FLOAT, weight.float()
    columns, rows = weight.shape
    tiles = -(-columns // LANES)
    padded_rows = -(-rows // 4) * 4
    numbers = np.int32 if kind == FLOAT else np.int16
    w = allocate((tiles, padded_rows, LANES), numbers)
    for start in range(0, tiles, 256):
        part = stored[start * LANES : (start + 256) * LANES].contiguous().view(torch.int32 if kind == FLOAT else torch.int16)
        padded = np.pad(part.numpy(), ((0, -part.shape[0] % LANES), (0, padded_rows - rows)))
        w[start : start + 256] = padded.reshape(-1, LANES, padded_rows).transpose(0, 2, 1)
    return Weights(kind, rows, columns, 0, padded_rows, w.reshape(-1).view(np.uint8), None, None, None, offset)


def _as_eight_bits(weight: Tensor) -> tuple[np.ndarray, Tensor, float] | None:
    """(q uint8 [K, N], scales half [K/32, N], error), if no weight changes by more than half precision would round the
    largest of its 32; else None."""
    columns, rows = weight.shape
    if rows % 32:
        return None
    q = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows // 32, columns, dtype=torch.float16)
    worst = 0.0
    for start in range(0, columns, _CACHED_ROWS):
        part = weight[start : start + _CACHED_ROWS].float().reshape(-1, rows // 32, 32)
        largest = torch.maximum(part.amax(-1, keepdim=True), -part.amin(-1, keepdim=True))
        middle = (largest / 127).half()
        scale, error = middle.float(), torch.full_like(largest, torch.inf)
        numbers, off_by = torch.empty_like(part), torch.empty_like(part)
        for step in (0, 1, -1):  # the scale in the original file may be the next half
            tried = (middle.view(torch.int16) + step).clamp_(min=0).view(torch.float16).float()
            torch.div(part, tried.clamp(min=1e-30), out=numbers).round_().clamp_(-127, 127)
            torch.mul(numbers, tried, out=off_by).sub_(part).abs_()
            off = off_by.amax(-1, keepdim=True) / largest.clamp(min=1e-30)
            better = off < error
            scale, error = torch.where(better, tried, scale), torch.where(better, off, error)
        worst = max(worst, float(error.max()))
        if worst > 2**-10:
            return None
        torch.div(part, scale.clamp(min=1e-30), out=numbers).round_().clamp_(-127, 127).add_(128)
        q[:, start : start + _CACHED_ROWS] = numbers.view(-1, rows).to(torch.uint8).T
        scales[:, start : start + _CACHED_ROWS] = scale[..., 0].T.half()
    return q.numpy(), scales, worst


def from_module(module: nn.Module, isa: str, team: Team, columns: Tensor | None = None, allocate: Zeros = aligned) -> Weights:
    """Of a packed or a dense layer; its outputs in the order of `columns`, int64 [N]."""
    if isinstance(module, GPTQLinear):
        return from_packed(module, isa, team, columns, allocate)
    assert isinstance(module, nn.Linear)
    if columns is None:
        return from_dense(module.weight, module.bias, isa, team, allocate)
    return from_dense(module.weight[columns], None if module.bias is None else module.bias[columns], isa, team, allocate)
