"""Weights of a model made dense for long prompts, which cuBLAS multiplies: in pieces each time, or once and for all.

Making them dense takes a twentieth of a long prompt's time and a third of a short one's. Where a GPU has four times as much free
memory as all of them take, they are kept, from the first long prompt or the fourth of middle length on. Conversations go first:
what is kept is freed as soon as they need its memory.

Those that are kept take their inputs in the model's own order where they can, so that nothing has to be put in order for them.
Not down: its inputs come in its order.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from . import wide_batch
from .cuda_layers import ModelWeights
from .cuda_weights import Weight
from .gpu_kernels import Gpu
from .kernel_arguments import TILE
from .row_kernels import MOST_NATURAL, order_rows

log = logging.getLogger(__name__)

_PIECE = 1 << 26  # weights made dense at once: 128 MB of fp16
_ROOM = 4  # times what all take must be free
_LEAST_KEPT_ROWS = 129  # multiplied with a dense weight that is there faster than with the packed one
_SEVERAL = 4  # inputs of so many rows or more, for which making them dense pays though packed ones would do


class DenseWeights:
    """Of one model. For one thread."""

    def __init__(self, gpu: Gpu, weights: ModelWeights, free_bytes: Callable[[], int]) -> None:
        """`free_bytes` tells what neither conversations nor computing need."""
        self._gpu, self._weights, self._free_bytes = gpu, weights, free_bytes
        self._kept: dict[int, Tensor] = {}  # by the address of the packed one
        self._norms: dict[int, Tensor] = {}  # in the model's own order, by the address of those in fragment order
        self._in_fragments = {layer.weights[-1].words.data_ptr() for layer in weights.layers}  # down
        self._keeps, self._room, self._asked = False, _ROOM, 0
        self._largest = max(_size(each) for layer in weights.layers for each in layer.weights)

    @cached_property
    def _all_bytes(self) -> int:
        return 2 * sum(_size(each) for layer in self._weights.layers for each in layer.weights)

    @property
    def size_bytes(self) -> int:
        """Of the weights that are kept."""
        return sum(each.numel() * 2 for each in self._kept.values())

    def of_rows(self, rows: int) -> "DenseRows | None":
        """For an input of so many rows; None where it is multiplied with the packed weights."""
        if rows < _LEAST_KEPT_ROWS:
            return None
        large = rows > wide_batch.most_rows(self._gpu)
        self._asked += 1
        if (large or self._asked >= _SEVERAL) and not self._keeps:
            self._keeps = self._all_bytes * self._room <= self._free_bytes()
        if not large and not self._keeps:
            return None
        return DenseRows(self)

    def rows_of(self, weight: Weight, scratch: Callable[[], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row, and rows fp16 [n, padded], which last until the next ones are asked for; see `natural`."""
        found = self._found(weight, scratch)
        if found is not None:
            yield 0, found
        else:
            yield from self._pieces(weight, scratch())

    def natural(self, weight: Weight, scratch: Callable[[], Tensor]) -> bool:
        """Whether the next `rows_of` this weight gives all rows, with inputs in the model's own order."""
        return self._can_be_natural(weight) and self._found(weight, scratch) is not None

    def _can_be_natural(self, weight: Weight) -> bool:
        own = weight.words.data_ptr() in self._in_fragments
        return not own and weight.in_features % 8 == 0 and weight.in_features <= MOST_NATURAL

    def natural_norm(self, norm: Tensor, weight: Weight) -> Tensor:
        """The weight of the norm before, from the order of that weight's input to the model's own."""
        found = self._norms.get(norm.data_ptr())
        if found is None:
            found = self._norms[norm.data_ptr()] = norm[weight.permutation.long()].contiguous()
            # a kernel of torch's in between: the norm's reads its weight before it waits for the one in front
            torch.zeros(1, device=self._gpu.device)
        return found

    def _found(self, weight: Weight, scratch: Callable[[], Tensor]) -> Tensor | None:
        """The weight that is kept, or that is made to be kept."""
        found = self._kept.get(weight.words.data_ptr())
        return self._make(weight, scratch) if found is None and self._keeps else found

    def _pieces(self, weight: Weight, out: Tensor) -> Iterator[tuple[int, Tensor]]:
        step = max(1, out.numel() // (TILE * weight.padded))
        for first in range(0, weight.tiles, step):
            yield first * TILE, weight.dense(self._gpu, first, min(step, weight.tiles - first), out)

    def scratch(self) -> Tensor:
        return torch.empty(min(_PIECE, self._largest), dtype=torch.float16, device=self._gpu.device)

    def _make(self, weight: Weight, scratch: Callable[[], Tensor]) -> Tensor | None:
        """A dense weight to be kept; None, and no more of them, where there is no room."""
        natural = self._can_be_natural(weight)
        width = weight.in_features if natural else weight.padded
        try:
            out = torch.empty(weight.tiles * TILE, width, dtype=torch.float16, device=self._gpu.device)
            pieces = scratch() if natural else out.view(-1)
        except torch.OutOfMemoryError:
            log.info("weights for prompts are not kept dense: the GPU is nearly full")
            self.free()
            return None
        if natural:
            for first, part in self._pieces(weight, pieces):
                order_rows(self._gpu, part, weight.permutation, out[first : first + len(part)])
        else:
            weight.dense(self._gpu, 0, weight.tiles, pieces)
        self._kept[weight.words.data_ptr()] = out
        return out

    def free(self) -> bool:
        """Give the memory back; False if there is none. Next time twice as much must be free."""
        self._keeps = False
        if not self._kept:
            return False
        self._room *= 2
        self._kept.clear()
        torch.cuda.empty_cache()
        return True


class DenseRows:
    """Dense weights for the products of one input."""

    def __init__(self, weights: DenseWeights) -> None:
        self._weights = weights

    @cached_property
    def _scratch(self) -> Tensor:
        return self._weights.scratch()

    def of(self, weight: Weight) -> Iterator[tuple[int, Tensor]]:
        return self._weights.rows_of(weight, lambda: self._scratch)

    def natural(self, weight: Weight) -> bool:
        """Whether `of` this weight, if it is asked for next, takes inputs in the model's own order."""
        return self._weights.natural(weight, lambda: self._scratch)

    def natural_norm(self, norm: Tensor, weight: Weight) -> Tensor:
        return self._weights.natural_norm(norm, weight)


def _size(weight: Weight) -> int:
    return weight.tiles * TILE * weight.padded
