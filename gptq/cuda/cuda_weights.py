"""Packed layers in the order that the kernels read them, made once from the file's tensors, which are then released.

Inputs are sorted by group, so act-order costs nothing later, and are kept in fragment order (common.cu). Layers that share
their input are one weight: q, k and v; gate and up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import bit_packing
from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from .gpu_kernels import Gpu
from .kernel_arguments import CHUNK, REPACK, TILE, UNPACK
from .kernel_source import BITS, Groups, Packing, groups_of

_SOURCES = 3  # layers that one weight is made of, at most
_MOST_COLUMNS = 1 << 28  # outputs of a layer: 28 bits of a word name one


def fragment_order(rows: Tensor | None, in_features: int, device: torch.device) -> Tensor:
    """int32 [padded]: the input at each position of fragment order; -1 where it is padding.

    `rows` int64 [K] lists the inputs sorted by group; None for their own order.
    """
    padded = -(-in_features // CHUNK) * CHUNK
    order = torch.full((padded,), -1, dtype=torch.int32, device=device)
    order[:in_features] = torch.arange(in_features, device=device) if rows is None else rows
    return step_order(order)  # [chunk, step, column, j] -> [chunk, column, step, j]


def step_order(order: Tensor) -> Tensor:
    """Undo the last step of `fragment_order`: [chunk, column, step, j] -> [chunk, step, column, j]; of [..., padded] each row."""
    return order.view(-1, 4, 4, 4).transpose(1, 2).reshape(order.shape)


def permutation_of(order: Tensor, in_features: int) -> Tensor:
    """int32 [K]: the position of each input in fragment order."""
    permutation = torch.empty(in_features + 1, dtype=torch.int32, device=order.device)  # padding goes to the last: no wait
    at = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    permutation.scatter_(0, torch.where(order >= 0, order, in_features).long(), at)
    return permutation[:in_features]


@dataclass(frozen=True)
class Weight:
    """One or several layers over the same input. N outputs in tiles of 16 rows, K inputs in chunks of 64."""

    packing: Packing
    words: Tensor  # uint8 [tiles, chunks, bits * 128]
    scales: Tensor  # int32 [tiles, groups, 8] of fp16 pairs, or [tiles, groups, 8, 2] with the zeros
    order: Tensor  # int32 [chunks * 64]: see fragment_order
    permutation: Tensor  # int32 [K], the position of each input in it
    bias: Tensor | None  # fp16 [tiles * 16], in the order of the rows
    in_features: int
    out_features: int  # rows that count; the last tile may hold more
    unit_to_group: int

    @property
    def tiles(self) -> int:
        return self.words.shape[0]

    @property
    def chunks(self) -> int:
        return self.words.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def padded(self) -> int:
        """Length of an input row in fragment order."""
        return self.chunks * CHUNK

    @property
    def lasting(self) -> bool:
        """Whether every scale lasts for whole pairs of chunks."""
        return self.packing.units == 1 and (self.unit_to_group == 0 or round(65536 / self.unit_to_group) % 2 == 0)

    @property
    def size_bytes(self) -> int:
        return self.words.numel() + self.scales.numel() * 4

    def dense(self, gpu: Gpu, first_tile: int, tiles: int, out: Tensor) -> Tensor:
        """The rows of some tiles as fp16 [tiles * 16, padded], inputs in fragment order, written into `out`."""
        out = out[: tiles * TILE * self.padded].view(tiles * TILE, self.padded)
        arguments = UNPACK.pack(
            weights=self.words,
            scales=self.scales,
            out=out,
            first_tile=first_tile,
            tiles=tiles,
            chunks=self.chunks,
            groups=self.groups,
            unit_to_group=self.unit_to_group,
        )
        gpu.run(f"unpack_{self.packing.name}", (-(-tiles * self.chunks // 8),), 256, arguments)
        return out


def packing_of(layers: Sequence[GPTQLinear]) -> Packing:
    """The format of layers that become one weight. Raises Unsuited if the kernels cannot read them as one."""
    first = layers[0]
    if first.bits not in BITS:
        raise Unsuited(f"weights of {first.bits} bits (the kernels read {', '.join(map(str, BITS))})")
    for each in layers:
        if (each.bits, each.group_size, each.in_features) != (first.bits, first.group_size, first.in_features):
            raise Unsuited("layers that share their input are packed in different formats")
        if sorted_rows(each) is not None and not torch.equal(each.g_idx, first.g_idx):
            raise Unsuited("layers that share their input have different act-orders")
    if len(layers) > _SOURCES or any(each.out_features >= _MOST_COLUMNS for each in layers):
        raise Unsuited("more layers, or wider ones, than a weight is made of")
    groups = groups_of(first.group_size, first.in_features)
    packing = Packing(first.bits, all(symmetric(each) for each in layers), groups.units)
    tiles = -(-sum(each.out_features for each in layers) // TILE)
    if tiles * groups.count * packing.scale_bytes >= 1 << 31:  # the kernels count them in an int
        raise Unsuited("more scales than the kernels can address")
    return packing


def sorted_rows(layer: GPTQLinear) -> Tensor | None:
    """int64 [K]: the inputs sorted by group, None if they are already. Raises Unsuited if groups have uneven sizes.

    Waits for the device where the layer has not been prepared."""
    facts = layer.facts
    if (
        facts is not None
        and facts.groups is None
        and layer.in_features == layer.scales.shape[0] * (layer.in_features if layer.group_size == -1 else layer.group_size)
    ):  # groups of one size, which are as many as they should be
        return facts.order
    g_idx = layer.g_idx.long()
    size = layer.in_features if layer.group_size == -1 else layer.group_size
    wanted = torch.arange(layer.in_features, device=g_idx.device) // size
    if torch.equal(g_idx, wanted):
        return None
    rows = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[rows], wanted):
        raise Unsuited("groups of uneven sizes")
    return rows


def symmetric(layer: GPTQLinear) -> bool:
    """Whether every zero is the middle of the range."""
    if layer.facts is not None:
        return layer.facts.zero == 1 << (layer.bits - 1)
    return bool((_zeros(layer) == 1 << (layer.bits - 1)).all())


def _zeros(layer: GPTQLinear) -> Tensor:
    return bit_packing.true_zeros(layer.qzeros, layer.bits, layer.out_features, layer.checkpoint_format)


def repack(gpu: Gpu, layers: Sequence[GPTQLinear], packing: Packing, columns: Tensor | None = None) -> Weight:
    """`layers` as one weight, in their common `packing`.

    `columns` int64 lists its rows: for each the number of an output, counted from the first layer's through the last
    layer's, or -1 for a row of zeros. By default all outputs in their order.
    """
    first, device = layers[0], gpu.device
    order = fragment_order(sorted_rows(first), first.in_features, device)
    chunks = order.numel() // CHUNK
    rows = rows_of(layers, columns, device)
    words = torch.empty(rows.numel() // TILE, chunks, packing.bits * 128, dtype=torch.uint8, device=device)
    repack_words(gpu, layers, coded(layers, rows), step_order(order), words)
    bias = None
    if any(each.bias is not None for each in layers):
        whole = [
            each.bias.half() if each.bias is not None else torch.zeros(each.out_features, dtype=torch.float16, device=device)
            for each in layers
        ]
        bias = torch.where(rows >= 0, torch.cat(whole)[rows.clamp(min=0)], 0)
    count = sum(each.out_features for each in layers) if columns is None else columns.numel()
    groups = groups_of(first.group_size, first.in_features)
    scales = tiled_scales(layers, packing, rows, chunks)
    permutation = permutation_of(order, first.in_features)
    return Weight(packing, words, scales, order, permutation, bias, first.in_features, count, groups.unit_to_group)


def rows_of(layers: Sequence[GPTQLinear], columns: Tensor | None, device: torch.device) -> Tensor:
    """int64 [tiles * 16]: the columns, or all outputs in their order, with -1 for rows of zeros to whole tiles."""
    if columns is None:
        columns = torch.arange(sum(each.out_features for each in layers), device=device)
    return torch.nn.functional.pad(columns, (0, -columns.numel() % TILE), value=-1)


def coded(layers: Sequence[GPTQLinear], rows: Tensor) -> Tensor:
    """`rows_of`, as the kernel takes it: int32, the layer's number in the bits above 28, the output's below."""
    found, start = torch.full_like(rows, -1), 0
    for at, each in enumerate(layers):
        own = (rows >= start) & (rows < start + each.out_features)
        found = torch.where(own, rows - start + (at << 28), found)
        start += each.out_features
    return found.int()


def repack_words(gpu: Gpu, layers: Sequence[GPTQLinear], rows: Tensor, order: Tensor, words: Tensor) -> None:
    """Fills uint8 [tiles, chunks, bits * 128]. `rows`: see `coded`; `order`: see `step_order`."""
    missing = (None,) * (_SOURCES - len(layers))
    packed = [each.qweight for each in layers]
    tiles, chunks, size = words.shape
    arguments = REPACK.pack(
        sources=(*packed, *missing),
        widths=(*(each.shape[1] for each in packed), *(0 for _ in missing)),
        columns=rows,
        order=order,
        out=words,
        tiles=tiles,
        chunks=chunks,
    )
    gpu.run(f"repack_{size // 128}", (-(-tiles * chunks * 32 // 256),), 256, arguments)


def tiled_scales(layers: Sequence[GPTQLinear], packing: Packing, rows: Tensor, chunks: int) -> Tensor:
    """int32 [tiles, groups, 8], pairs (r, r + 8) of fp16 scales; with the zeros [tiles, groups, 8, 2]. `rows`: see `rows_of`."""
    first = layers[0]
    groups = groups_of(first.group_size, first.in_features)
    kept, source = rows >= 0, rows.clamp(min=0)

    def by_tile(values: Tensor) -> Tensor:
        """fp16 [G, rows of all layers] -> int32 [tiles, groups, 8]; zeros for padding."""
        stored = _stored(values, groups, first.group_size, chunks)
        picked = torch.zeros(groups.count, rows.numel(), dtype=torch.float16, device=rows.device)
        picked[: stored.shape[0]] = torch.where(kept, stored[:, source], 0)
        return picked.view(groups.count, -1, 2, 8).permute(1, 0, 3, 2).contiguous().view(torch.int32).squeeze(-1)

    scales = by_tile(torch.cat([each.scales.to(torch.float16) for each in layers], dim=1))
    if packing.sym:
        return scales
    zeros = torch.cat([_zeros(each).to(torch.float16) + 1024 for each in layers], dim=1)
    return torch.stack([scales, by_tile(zeros)], dim=-1).contiguous()


def _stored(values: Tensor, groups: Groups, group_size: int, chunks: int) -> Tensor:
    """[G, N], a row for each group -> a row for each unit where units are what is stored; else as it is."""
    if not groups.units_stored:
        return values
    unit = CHUNK // groups.units
    group = torch.arange(chunks * groups.units, device=values.device) * unit // group_size
    return values[group.clamp(max=values.shape[0] - 1)]
