"""The same layers of many experts in the kernels' order, several experts at once.

Repacking takes some sixty small operations of torch, and a mixture of 48 layers with 128 experts has 12,000 such weights. So
only the words are repacked for each, by one launch; scales and orders are made for as many experts as have one form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from .cuda_weights import Weight, coded, fragment_order, repack, repack_words, rows_of, sorted_rows, step_order, tiled_scales
from .gpu_kernels import Gpu
from .kernel_source import Packing

Layers = Sequence[GPTQLinear]  # of one expert, over the same input


@dataclass(frozen=True)
class Repacked:
    """Some of the experts."""

    first: Weight  # the first of them
    words: Tensor  # uint8 [count, tiles, chunks, bits * 128]
    scales: Tensor  # int32 [count, tiles, groups, …]
    orders: Tensor  # int32 [count, padded]: see fragment_order


def repack_experts(gpu: Gpu, experts: Sequence[Layers], packing: Packing, columns: Tensor | None) -> Iterator[Repacked]:
    """The next experts that have one form, until all are repacked; their layers are released.

    `columns`: the rows of each, as in `repack`.
    """
    at = 0
    while at < len(experts):
        some = experts[at : at + _alike(experts[at:])]
        first = repack(gpu, some[0], packing, columns)
        if len(some) == 1:
            found = Repacked(first, first.words[None], first.scales[None], first.order[None])
        else:
            found = _together(gpu, some, first, columns)
        for own in some:
            for each in own:
                each.release()
        yield found
        at += len(some)


def _together(gpu: Gpu, some: Sequence[Layers], first: Weight, columns: Tensor | None) -> Repacked:
    count, own = len(some), some[0]
    rows = rows_of(own, columns, gpu.device)
    words = torch.empty(count, *first.words.shape, dtype=torch.uint8, device=gpu.device)
    sorted_by = [sorted_rows(each[0]) for each in some]
    if all(each is None for each in sorted_by):
        orders = first.order.expand(count, -1)
    else:
        orders = torch.stack([fragment_order(each, first.in_features, gpu.device) for each in sorted_by])
    codes, steps = coded(own, rows), step_order(orders.contiguous())
    for at, each in enumerate(some):
        repack_words(gpu, each, codes, steps[at], words[at])
    joined = [_joined(each) for each in zip(*some, strict=True)]
    scales = tiled_scales(joined, first.packing, _side_by_side(rows, [each.out_features for each in own], count), first.chunks)
    return Repacked(first, words, scales.view(count, *first.scales.shape), orders)


def _alike(experts: Sequence[Layers]) -> int:
    """How many of the first experts have one form."""
    first = experts[0]
    if any(each.qzeros.shape[1] * 32 != each.out_features * each.bits for each in first):
        return 1  # the zeros of the next would begin within a word
    for at, own in enumerate(experts):
        for one, other in zip(first, own, strict=True):
            if (one.out_features, one.checkpoint_format, one.bias is None) != (
                other.out_features, other.checkpoint_format, other.bias is None,
            ):  # fmt: skip
                return at
    return len(experts)


def _joined(layers: Sequence[GPTQLinear]) -> GPTQLinear:
    """A layer with the scales and zeros of several of one form side by side, and no weights."""
    first = layers[0]
    whole = GPTQLinear(
        first.in_features, first.out_features * len(layers), first.bits, first.group_size,
        checkpoint_format=first.checkpoint_format, bias=False, dtype=first.scales.dtype, device="meta",
    )  # fmt: skip
    for part in ("qzeros", "scales"):
        tensors = [getattr(each, part).data for each in layers]
        setattr(whole, part, nn.Parameter(torch.cat(tensors, 1), requires_grad=False))
    return whole


def _side_by_side(rows: Tensor, widths: Sequence[int], count: int) -> Tensor:
    """int64 [count * rows]: the rows of one expert with `widths` outputs, for each of `count` whose layers are joined."""
    found = torch.full((count, rows.numel()), -1, dtype=torch.int64, device=rows.device)
    experts = torch.arange(count, device=rows.device)[:, None]
    start = 0
    for width in widths:
        own = (rows >= start) & (rows < start + width)
        found = torch.where(own, rows - start + start * count + experts * width, found)
        start += width
    return found.view(-1)
