"""LoRA adapters in the layout of the compiled forward: several become one of a larger rank.

A tile of A has sixteen numbers of A x, a tile of B sixteen outputs (tiles.py, dense layout). Ranks and inputs are padded with
zeros, to multiples of 16 and of 4.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.errors import BadCheckpoint
from ..lora import Part
from . import forward_arguments as f
from .cpu_weights import FLOAT, HALF, Weights
from .tiles import LANES
from .weight_room import aligned

_SMALLEST, _LARGEST = 2**-10, 6e4  # of the largest number of a matrix that is stored in halves


class CpuAdapter:
    """y += sum of w B (A x) over adapters with weights w."""

    def __init__(
        self,
        adapters: Sequence[tuple[Mapping[str, Part], float]],  # of lora.read, with their weights
        rows: Mapping[int, tuple[int, Tensor | None]],  # id of a module -> (row of the table of weights, order of its outputs)
        weights: Sequence[Weights],
    ) -> None:
        """Raises BadCheckpoint for a module that is not among `rows`."""
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for parts, weight in adapters:
            for name, (module, inner, outer) in parts.items():
                if id(module) not in rows:
                    raise BadCheckpoint(
                        f"The adapter changes {name}, which is no linear layer of a block that the step computes by itself. It "
                        "can only be given for the whole model: set it as the option LoRA adapter in the Model tab."
                    )
                row, order = rows[id(module)]
                outer = outer.float() * weight
                found.setdefault(row, []).append((inner.float(), outer if order is None else outer[order]))
        self.rank = LANES  # the largest, padded
        self.table = np.zeros((len(weights), f.ADAPTER_COLUMNS), np.int64)
        self._kept: list[np.ndarray] = []
        for row, pairs in found.items():
            inner, outer = torch.cat([a for a, _b in pairs]), torch.cat([b for _a, b in pairs], 1)
            rank = _up(inner.shape[0], LANES)
            kind = HALF if all(_fits_half(each) for each in (inner, outer)) else FLOAT
            inputs = _up(inner.shape[1], 4)
            at_a = self._tiles(inner, rank, inputs, kind)
            at_b = self._tiles(outer, weights[row].tiles * LANES, rank, kind)
            self.table[row] = rank, inputs, kind, at_a, at_b
            self.rank = max(self.rank, rank)

    @property
    def address(self) -> int:
        return int(self.table.ctypes.data)

    @property
    def size_bytes(self) -> int:
        return self.table.nbytes + sum(each.nbytes for each in self._kept)

    def _tiles(self, matrix: Tensor, outputs: int, inputs: int, kind: int) -> int:
        """The address of `matrix` [outputs, inputs] in tiles [outputs / 16][inputs][16]."""
        padded = torch.nn.functional.pad(matrix, (0, inputs - matrix.shape[1], 0, outputs - matrix.shape[0]))
        numbers = padded.to(torch.float16 if kind == HALF else torch.float32).numpy()
        tiles = aligned((outputs // LANES, inputs, LANES), numbers.dtype)
        tiles[...] = numbers.reshape(-1, LANES, inputs).transpose(0, 2, 1)
        self._kept.append(tiles)
        return int(tiles.ctypes.data)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _fits_half(matrix: Tensor) -> bool:
    """Whether halves change no number by more than 2**-11 of the largest."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return largest == 0 or _SMALLEST <= largest <= _LARGEST
