"""The same layers of many experts in the kernels' order, several experts at once.

Repacking takes some sixty small operations of torch, and a mixture of 48 layers with 128 experts has 12,000 such weights. Those
of experts whose inputs are in their own order lie side by side, as if they were the outputs of one wide layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from .cuda_weights import Weight, repack, sorted_rows
from .gpu_kernels import Gpu
from .kernel_arguments import TILE
from .kernel_source import Packing

_BYTES = 1 << 27  # of packed weights that are copied to lie side by side, at most

Layers = Sequence[GPTQLinear]  # of one expert, over the same input


def repack_experts(
    gpu: Gpu, experts: Sequence[Layers], packing: Packing, columns: Tensor | None
) -> Iterator[tuple[Weight, Tensor, Tensor]]:
    """(the weight of one, words [count, tiles, …], scales [count, tiles, …]) of the next experts, until all are repacked.

    `columns`: the rows of each, as in `repack`. The layers are released.
    """
    at = 0
    while at < len(experts):
        count = _alike(experts[at:])
        some = experts[at : at + count]
        if count == 1:
            weight = repack(gpu, some[0], packing, columns)
            words, scales = weight.words[None], weight.scales[None]
        else:
            whole = torch.arange(sum(each.out_features for each in some[0]), device=gpu.device) if columns is None else columns
            joined = [_joined(own) for own in zip(*some, strict=True)]
            weight = repack(gpu, joined, packing, _side_by_side(whole, [each.out_features for each in some[0]], count))
            words, scales = (each.view(count, -1, *each.shape[1:]) for each in (weight.words, weight.scales))
            bias = None if weight.bias is None else weight.bias[: words.shape[1] * TILE]
            weight = replace(weight, words=words[0], scales=scales[0], bias=bias, out_features=whole.numel())
        yield weight, words, scales
        for own in some:
            for each in own:
                each.release()
        at += count


def _alike(experts: Sequence[Layers]) -> int:
    """How many of the first experts can lie side by side."""
    first = experts[0]
    if any(sorted_rows(each) is not None or each.qzeros.shape[1] * 32 != each.out_features * each.bits for each in first):
        return 1
    most = max(1, _BYTES // sum(each.qweight.numel() * 4 for each in first))
    for at, own in enumerate(experts[1:most], 1):
        for one, other in zip(first, own, strict=True):
            if one.out_features != other.out_features or one.checkpoint_format != other.checkpoint_format:
                return at
            if (one.bias is None) != (other.bias is None) or sorted_rows(other) is not None:
                return at
    return min(most, len(experts))


def _joined(layers: Sequence[GPTQLinear]) -> GPTQLinear:
    """Layers of one format whose inputs are in their own order, with their outputs side by side."""
    first = layers[0]
    whole = GPTQLinear(
        first.in_features, first.out_features * len(layers), first.bits, first.group_size,
        checkpoint_format=first.checkpoint_format, bias=first.bias is not None, dtype=first.scales.dtype, device="meta",
    )  # fmt: skip
    for part in ("qweight", "qzeros", "scales"):
        tensors = [getattr(each, part).data for each in layers]
        setattr(whole, part, nn.Parameter(torch.cat(tensors, 1), requires_grad=False))
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([each.bias.data for each in layers if each.bias is not None]), requires_grad=False)
    whole.g_idx = first.g_idx
    whole._facts = first.facts
    return whole


def _side_by_side(columns: Tensor, widths: Sequence[int], count: int) -> Tensor:
    """int64 [count * padded]: the rows of one expert with `widths` outputs, for each of `count` whose layers are joined."""
    columns = nn.functional.pad(columns, (0, -columns.numel() % TILE), value=-1)
    found = torch.full((count, columns.numel()), -1, dtype=torch.int64, device=columns.device)
    experts = torch.arange(count, device=columns.device)[:, None]
    start = 0
    for width in widths:
        own = (columns >= start) & (columns < start + width)
        found = torch.where(own, columns - start + start * count + experts * width, found)
        start += width
    return found.view(-1)
