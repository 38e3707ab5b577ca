"""The modules of a rank at the sources where ranks meet: after attention, after the MLP, and at both ends of the model."""

from typing import Any

import torch
from torch import Tensor, nn

from .rank_group import RankGroup
from .shares import Span


class SummedOutput(nn.Module):
    """A layer of which every rank has some inputs: the outputs are summed. One rank has the bias."""

    def __init__(self, linear: nn.Module, group: RankGroup) -> None:
        super().__init__()
        self.linear, self._group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).contiguous()
        self._group.sum(y)
        return y


def sum_outputs(hf: Any, group: RankGroup) -> None:
    """Sum the outputs of o and down over the ranks, whatever computes them by now."""
    for block in hf.model.layers:
        block.self_attn.o_proj = SummedOutput(block.self_attn.o_proj, group)
        block.mlp.down_proj = SummedOutput(block.mlp.down_proj, group)


class PickedInputs(nn.Module):
    """A layer whose inputs are picked from those it is given; one that has the number past the last is zero."""

    def __init__(self, linear: nn.Module, sources: Tensor, width: int) -> None:
        """`sources` int64: the number of each input of `linear`, of `width` that are given."""
        super().__init__()
        self.linear, self.width = linear, width
        self.register_buffer("sources", sources, persistent=False)
        self.sources: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(nn.functional.pad(x, (0, 1)).index_select(-1, self.sources))
        return y


class DividedEmbedding(nn.Module):
    """The rows of the vocabulary that this rank has; zeros for the others, and the sum of all ranks."""

    def __init__(self, weight: Tensor, span: Span, group: RankGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # [rows, H]
        self._span, self._group = span, group

    def forward(self, ids: Tensor) -> Tensor:
        """[…] -> [..., H]."""
        others = (ids < self._span.start) | (ids >= self._span.end)
        # no torch.where with a number: on a GPU that is a copy from the host, which no graph takes
        found = nn.functional.embedding((ids - self._span.start).masked_fill_(others, 0), self.weight)
        found = found.masked_fill_(others[..., None], 0)
        self._group.sum(found)
        return found


class GatheredOutput(nn.Module):
    """An output layer of which every rank has some rows of the vocabulary: all of them have all logits."""

    def __init__(self, linear: nn.Module, spans: list[Span], group: RankGroup) -> None:
        super().__init__()
        self.linear, self._spans, self._group = linear, spans, group

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        own = self.linear(x)
        longest = max(map(len, self._spans))
        found = self._group.gather(nn.functional.pad(own, (0, longest - own.shape[-1])))
        return torch.cat([each[..., : len(span)] for each, span in zip(found, self._spans, strict=True)], -1)
