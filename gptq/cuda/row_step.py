"""What the answers that run at the same time (running_answers.py) ask of a model's step, and of who has its memory."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .sequences import RowsShape, Sequences


class RowStep(Protocol):
    """Computes the tokens of several sequences at once, and samples the next ones."""

    device: torch.device

    @property
    def sequences(self) -> Sequences: ...

    @property
    def shape(self) -> RowsShape: ...

    def rows_of(self, rows: int, /) -> int:
        """How many are computed where the first `rows` are wanted."""

    def step_rows(self, rows: int, sample_next: bool = True, adapters: Mapping[int, Any] = ...) -> None:
        """Compute the tokens of the first rows and choose the next ones, or leave them at `logits`. `adapters`: by row."""

    def sample(self, first: int, rows: int) -> None:
        """Choose the next tokens of some rows from their `logits`."""

    def mark(self) -> Any:
        """Here in the order of what is launched: `synchronize` waits until the GPU has come so far."""

    def grow(self, rows: int) -> None:
        """Room for that many rows. Raises torch.OutOfMemoryError, and then nothing has changed."""


class Room(Protocol):
    """Memory for conversations, and who waits where it runs out (page_room.py)."""

    def number(self) -> int:
        """In the order of arrival."""

    def hold(self, holder: Any) -> None: ...

    def leave(self, holder: Any) -> None: ...

    def extend(self, holder: Any, tokens: int) -> bool:
        """Memory for so many tokens of one that runs. False if it gave up its own."""

    def capacity_of(self, memory: Any) -> int:
        """Tokens that it has memory for."""

    def grown(self, memory: Any) -> None:
        """A token more is computed, or will be."""

    def shorten(self, memory: Any, tokens: int) -> None:
        """What was computed beyond so many tokens does not count."""
