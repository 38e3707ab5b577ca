"""What packed layers' g_idx and zeros are, found for many layers at once: the host waits once for all of them.

On a GPU every question to one layer is a wait, and a model of 7B has 224 layers with six questions each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import bit_packing

_AT_ONCE = 1 << 21  # numbers looked at in one call: some tens of MB beside the weights


@dataclass(frozen=True)
class Facts:
    """What `GPTQLinear.prepare` learnt from g_idx and qzeros. Holds nothing of the size of the weights."""

    order: Tensor | None  # int64 [K]: the input rows sorted by group; None if they are (no act-order)
    groups: Tensor | None  # int64 [K]: group of each row of that order; None if all groups have K/G rows
    zero: int | None  # the zero of every group and column; None if they differ (asymmetric)

    def to(self, device: torch.device) -> "Facts":
        order = None if self.order is None else self.order.to(device)
        groups = None if self.groups is None else self.groups.to(device)
        return Facts(order, groups, self.zero)


@dataclass(frozen=True)
class Findings:
    """Of one layer, whether it is sound and what follows from it."""

    low: int  # of g_idx
    high: int
    possible: bool  # all groups have as many rows and only the last has fewer, as every GPTQ program makes them; True where
    # g_idx names a group there is none of, which `low` and `high` tell
    flooded: int  # words of its zeros that look damaged (bit_packing.flooded_zeros)
    facts: Facts | None  # None where g_idx names a group there is none of


def find(layers: Sequence[Any]) -> list[Findings]:
    """The findings of GPTQLinears whose tensors are on devices and in words of int32. Waits once for each device."""
    g_flags: dict[int, Tensor] = {}  # by the position in `layers`: int64 [5]
    z_flags: dict[int, Tensor] = {}  # int64 [3]
    indices: dict[int, Tensor] = {}  # int64 [K]
    with torch.no_grad():
        for ats, stacked, count in _by_g_idx(layers):
            g_flags.update(zip(ats, _order_flags(stacked, count), strict=True))
            indices.update(zip(ats, stacked, strict=True))
        for ats, stacked, layer in _by_zeros(layers):
            z_flags.update(zip(ats, _zero_flags(stacked, layer), strict=True))
        flags = _fetched([torch.cat([g_flags[at], z_flags[at]]) for at in range(len(layers))])
        orders = _orders({at: indices[at] for at, each in enumerate(flags) if not each[2] and _in_range(each, layers[at])})
        found = []
        for at, (low, high, is_sorted, is_even, possible, zero, uniform, flooded) in enumerate(flags):
            facts = None
            if _in_range(flags[at], layers[at]):
                order = None if is_sorted else orders[at]
                groups = None if is_even else indices[at].clone() if order is None else indices[at][order]
                facts = Facts(order, groups, zero if uniform else None)
            found.append(Findings(low, high, bool(possible), flooded, facts))
        return found


def _in_range(flags: Sequence[int], layer: Any) -> bool:
    return flags[0] >= 0 and flags[1] < layer.scales.shape[0]


def ranges(layers: Sequence[Any]) -> list[tuple[int, int]]:
    """(lowest, highest) of each layer's g_idx. Waits once for each device."""
    return [(int(low), int(high)) for low, high in _fetched([torch.stack(each.g_idx.aminmax()).long() for each in layers])]


def _by_g_idx(layers: Sequence[Any]) -> list[tuple[list[int], Tensor, int]]:
    """(positions, int64 [layers, K], groups) of layers that have as many inputs and groups, a few at a time."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, each in enumerate(layers):
        alike[(each.g_idx.device, each.g_idx.shape[0], each.scales.shape[0])].append(at)
    found = []
    for (_device, length, count), ats in alike.items():
        for some in _some(ats, length):
            found.append((some, torch.stack([layers[at].g_idx.detach().long() for at in some]), count))
    return found


def _by_zeros(layers: Sequence[Any]) -> list[tuple[list[int], Tensor, Any]]:
    """(positions, int32 [layers, G, W], one of them) of layers whose zeros have one shape and one meaning."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, each in enumerate(layers):
        shape = tuple(each.qzeros.shape)
        alike[(each.qzeros.device, shape, each.qzeros.dtype, each.bits, each.out_features, each.checkpoint_format)].append(at)
    found = []
    for (_device, shape, *_), ats in alike.items():
        for some in _some(ats, shape[0] * layers[ats[0]].out_features):
            found.append((some, torch.stack([layers[at].qzeros.detach() for at in some]), layers[some[0]]))
    return found


def _some(ats: list[int], size: int) -> list[list[int]]:
    step = max(1, _AT_ONCE // max(1, size))
    return [ats[at : at + step] for at in range(0, len(ats), step)]


def _order_flags(g_idx: Tensor, count: int) -> Tensor:
    """int64 [layers, K] -> int64 [layers, 5]: lowest, highest, sorted, even, possible."""
    length = g_idx.shape[1]
    low, high = g_idx.amin(1), g_idx.amax(1)
    outside = (low < 0) | (high >= count)
    is_sorted = (g_idx[:, 1:] >= g_idx[:, :-1]).all(1)
    rows = torch.zeros(g_idx.shape[0], count, dtype=torch.int64, device=g_idx.device)
    rows.scatter_add_(1, g_idx.clamp(0, count - 1), torch.ones_like(g_idx))
    even = (rows * count == length).all(1)
    full, last = rows[:, 0], rows[:, -1]
    possible = outside | ((rows[:, :-1] == full[:, None]).all(1) & (last > 0) & (last <= full))
    if count == 1:
        possible = torch.ones_like(possible)
    return torch.stack([low, high, is_sorted.long(), even.long(), possible.long()], dim=1)


def _zero_flags(qzeros: Tensor, layer: Any) -> Tensor:
    """int32 [layers, G, W] -> int64 [layers, 3]: the first zero, whether all are that, words that look damaged."""
    several, groups, words = qzeros.shape
    zeros = bit_packing.true_zeros(qzeros.view(-1, words), layer.bits, layer.out_features, layer.checkpoint_format)
    zeros = zeros.reshape(several, groups * layer.out_features)
    uniform = (zeros == zeros[:, :1]).all(1)
    flooded = bit_packing.flooded_words(qzeros, layer.bits).flatten(1).sum(1)
    return torch.stack([zeros[:, 0].long(), uniform.long(), flooded], dim=1)


def _orders(indices: dict[int, Tensor]) -> dict[int, Tensor]:
    """The rows sorted by group, of layers that have an act-order; those of one length are sorted together."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, each in indices.items():
        alike[(each.device, each.shape[0])].append(at)
    found: dict[int, Tensor] = {}
    for (_device, length), ats in alike.items():
        for some in _some(ats, length):
            orders = torch.stack([indices[at] for at in some]).argsort(dim=1, stable=True)
            found.update(zip(some, orders, strict=True))
    return found


def _fetched(flags: Sequence[Tensor]) -> list[list[int]]:
    """Small tensors as numbers, in their order."""
    found: list[list[int]] = [[]] * len(flags)
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for at, each in enumerate(flags):
        by_device[each.device].append(at)
    for ats in by_device.values():
        for at, values in zip(ats, torch.stack([flags[at] for at in ats]).tolist(), strict=True):
            found[at] = values
    return found
