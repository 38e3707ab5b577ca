"""Which rows of a GPU the running answers have. Rows that are left stay idle until fewer of them can be computed."""

import logging
from collections.abc import Callable

import torch

from .answer_rows import Answer
from .row_step import RowStep
from .sequences import IDLE

log = logging.getLogger(__name__)


class RowTable:
    """Up to `limit` rows, or as many as fit."""

    def __init__(self, step: RowStep, limit: int, read_all: Callable[[], None]) -> None:
        """`read_all`: let the host read what is sampled in the rows as they are."""
        self._step, self._limit, self._read_all = step, limit, read_all
        self._of: dict[int, Answer] = {}
        self.active: list[Answer] = []  # that have a row, the oldest first

    @property
    def end(self) -> int:
        """One more than the last row that an answer has."""
        return max(self._of) + 1

    @property
    def goes_on(self) -> bool:
        """Whether a step can follow before the host has read anything, and somebody wants what it computes."""
        return any(each.wants_more for each in self.active) and not any(each.needs_host for each in self.active)

    def give(self, answer: Answer) -> bool:
        """The first free row; False if there is none, and no room for more."""
        rows = self._step.sequences.rows
        free = next((row for row in range(min(rows, self._limit)) if row not in self._of), None)
        if free is None:
            if rows >= self._limit or not self._grow(min(self._limit, 2 * rows)):
                return False
            free = rows
        answer.row = free
        self._of[free] = answer
        self.active.append(answer)
        self.active.sort(key=lambda each: each.number)
        return True

    def _grow(self, rows: int) -> bool:
        self._read_all()
        try:
            self._step.grow(rows)
        except torch.OutOfMemoryError:
            self._limit = self._step.sequences.rows
            log.info("answers at once are limited to %d: the GPU is nearly full", self._limit)
            return False
        return True

    def take(self, answer: Answer) -> None:
        """An answer's row becomes idle."""
        self.active.remove(answer)
        del self._of[answer.row]
        self._step.sequences.set_position(answer.row, IDLE)
        answer.row = IDLE

    def close_gaps(self) -> None:
        """Move the last answers into rows that were left, where fewer rows are computed then."""
        if not self._of or self._step.rows_of(self.end) == self._step.rows_of(len(self._of)):
            return
        self._read_all()  # what is pending is at the rows as they are
        while self._of and self._step.rows_of(self.end) > self._step.rows_of(len(self._of)):
            last = self.end - 1
            free = next(row for row in range(last) if row not in self._of)
            answer = self._of.pop(last)
            sequences = self._step.sequences
            sequences.move(last, free)
            sequences.host_masks[free].copy_(sequences.host_masks[last])
            self._of[free] = answer
            answer.row = free

    def clear(self) -> None:
        self.active.clear()
        self._of.clear()
