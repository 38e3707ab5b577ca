"""What a model's own forward does otherwise while a token is recorded: experts that the GPU picks (chosen_experts.py), and masks
that a model keeps as a table."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .chosen_experts import take_experts


@contextmanager
def adapted(model: nn.Module, counts: Tensor, shown: int) -> Iterator[None]:
    """While it lasts, forwards are of one token of each row, after `counts` int64 [rows] others; it sees `shown` keys."""
    with ExitStack() as undo:
        take_experts(model, undo)
        undo.enter_context(RowsOfTables(model, counts, shown))
        yield


class RowsOfTables(TorchFunctionMode):
    """GPT-Neo's attention takes what a token sees from a table [1, 1, positions, positions] of its own, and which row by how many
    keys there are. A cache at fixed addresses shows more keys than there are tokens: the row is that of the token's place."""

    def __init__(self, model: nn.Module, counts: Tensor, shown: int) -> None:
        super().__init__()
        self._counts, self._shown = counts, shown
        self._tables = {id(each): each for each in model.buffers() if _is_table(each)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and id(args[0]) in self._tables and self._asks_for_the_last(args[1]):
            return self._rows(args[0])
        return func(*args, **(kwargs or {}))

    def _asks_for_the_last(self, index: Any) -> bool:
        last = (slice(None), slice(None), slice(self._shown - 1, self._shown), slice(self._shown))
        return isinstance(index, tuple) and all(isinstance(each, slice) for each in index) and index == last

    def _rows(self, table: Tensor) -> Tensor:
        """[rows, 1, 1, shown]; what is behind the table is not seen."""
        positions = table.shape[-1]
        rows = table[0, 0, :, : self._shown].index_select(0, self._counts.clamp(max=positions - 1))
        return functional.pad(rows, (0, max(0, self._shown - positions)))[:, None, None]


def _is_table(buffer: Tensor) -> bool:
    shape = buffer.shape
    return buffer.dtype == torch.bool and len(shape) == 4 and shape[0] == shape[1] == 1 and shape[2] == shape[3]
