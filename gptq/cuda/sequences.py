"""The state on the GPU of each sequence that is being continued: row i of every tensor is the i-th sequence.

A row whose position is -1 is idle: the kernels pass over it. `grow` makes room for more rows; graphs hold the addresses of
the tensors, so they must be recorded again afterwards.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .kernel_arguments import HOST_TOKENS, PAGE_TOKENS, SAMPLE_PARAMS
from .kv_pages import PagedMemory

IDLE = -1  # the position of a row that no sequence has


class RowsShape(Protocol):
    """What sequences need to know of a model."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def max_pages(self) -> int:
        """Of one conversation."""


class Sequences:
    """State of up to `rows` sequences. `table` has one row more, the last: the prompt that is being read (`prompt_row`)."""

    prompt_row = -1

    def __init__(self, device: torch.device, shape: RowsShape, rows: int) -> None:
        self.shape, self.device, self.rows = shape, device, rows
        for name, tensor in self._tensors(rows).items():
            setattr(self, name, tensor)
        self._pages: list[list[int]] = [[] for _ in range(rows + 1)]  # what `table` holds

    ids: Tensor  # int32 [rows], of the token that is computed next
    positions: Tensor  # int32 [rows], its position
    logits: Tensor  # fp32 [rows, V]
    table: Tensor  # int64 [rows + 1, pages of a context], addresses of pages
    # what the sampler reads and writes: see SampleArguments
    params: Tensor
    bias: Tensor
    masks: Tensor
    seen: Tensor
    answered: Tensor
    history: Tensor
    answer_from: Tensor
    work: Tensor
    host_tokens: Tensor  # int32 [rows, HOST_TOKENS], in the host's memory
    host_masks: Tensor  # as `masks`, in the host's memory

    def _tensors(self, rows: int) -> dict[str, Tensor]:
        device, shape = self.device, self.shape
        vocabulary, context, words = shape.vocabulary, shape.context_tokens, -(-shape.vocabulary // 32)
        pinned = device.type == "cuda"

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return {
            "ids": zeros(rows),
            "positions": zeros(rows).fill_(IDLE),
            "logits": zeros(rows, vocabulary, dtype=torch.float32),
            "table": zeros(rows + 1, shape.max_pages, dtype=torch.int64),
            "params": zeros(rows, SAMPLE_PARAMS.size_bytes, dtype=torch.uint8),
            "bias": zeros(rows, vocabulary, dtype=torch.float32),
            "masks": zeros(rows, words),
            "seen": zeros(rows, vocabulary, dtype=torch.int16),
            "answered": zeros(rows, vocabulary, dtype=torch.int16),
            "history": zeros(rows, context),
            "answer_from": zeros(rows),
            "work": zeros(rows, vocabulary, dtype=torch.float32),
            "host_tokens": torch.zeros(rows, HOST_TOKENS, dtype=torch.int32, pin_memory=pinned),
            "host_masks": torch.zeros(rows, words, dtype=torch.int32, pin_memory=pinned),
        }

    @property
    def row_bytes(self) -> int:
        """Of the GPU's memory, for each row."""
        return sum(each.nbytes for each in self._on_device()) // self.rows

    def _on_device(self) -> list[Tensor]:
        return [each for each in vars(self).values() if isinstance(each, Tensor) and each.device == self.ids.device]

    def grow(self, rows: int) -> None:
        """Room for that many rows. Nothing may be running. Raises torch.OutOfMemoryError, and then nothing has changed."""
        larger = self._tensors(rows)
        for name, tensor in larger.items():
            tensor[: self.rows].copy_(getattr(self, name)[: self.rows])
        larger["table"][-1].copy_(self.table[-1])
        for name, tensor in larger.items():
            setattr(self, name, tensor)
        self._pages[-1:-1] = [[] for _ in range(rows - self.rows)]
        self.rows = rows

    # -- pages ---------------------------------------------------------------------------------------------------------

    def use(self, memory: PagedMemory, tokens: int, row: int = 0) -> None:
        """Make `memory` the one that a row reads and writes, with pages for that many tokens.

        Raises torch.OutOfMemoryError, and ValueError for more tokens than the context has.
        """
        if tokens > self.shape.context_tokens:
            raise ValueError(f"{tokens} tokens were to be kept; the context has {self.shape.context_tokens}.")
        memory.reserve(tokens)
        self.show([(memory, row)])

    def show(self, memories: Iterable[tuple[PagedMemory, int]]) -> None:
        """Write the pages of memories into the tables of their rows: what is new there, all of it in one copy."""
        rows: list[int] = []
        columns: list[int] = []
        addresses: list[int] = []
        for memory, row in memories:
            pages, before = memory.pages, self._pages[row]
            if pages == before:
                continue
            same = len(before) if pages[: len(before)] == before else 0
            rows += [row % (self.rows + 1)] * (len(pages) - same)
            columns += range(same, len(pages))
            addresses += pages[same:]
            self._pages[row] = list(pages)
        if addresses:
            at = self.sent(np.array([rows, columns, addresses], np.int64))
            self.table.index_put_((at[0], at[1]), at[2])

    def most_tokens(self, rows: int) -> int:
        """That the pages of any of the first rows hold."""
        return PAGE_TOKENS * max(map(len, self._pages[:rows]), default=0)

    # -- one row -------------------------------------------------------------------------------------------------------

    def set_params(self, row: int, packed: bytes) -> None:
        """How a row's tokens are sampled: a packed SAMPLE_PARAMS."""
        self.params[row].copy_(self.sent(np.frombuffer(bytearray(packed), np.uint8)))

    def set_history(self, row: int, ids: Sequence[int] | Tensor, repetition_range: int, answer_from: int | None = None) -> None:
        """What is before the next sampled token of a row: a prompt, and from `answer_from` on an answer that goes on.

        The penalties look back at `repetition_range` tokens; 0 for all.
        """
        known = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, np.int32)
        count = len(known)
        begins = count if answer_from is None else answer_from
        self.history[row, :count] = self.sent(known)
        first = max(0, count - repetition_range) if repetition_range else 0
        for counts, recent in ((self.seen, known[first:]), (self.answered, known[max(first, begins) :])):
            counts[row].zero_()
            if len(recent):
                tokens, times = np.unique(recent[recent < self.shape.vocabulary], return_counts=True)
                counts[row].index_put_((self.sent(tokens.astype(np.int64)),), self.sent(times.clip(max=32767).astype(np.int16)))
        self.set_position(row, count - 1)
        self.answer_from[row : row + 1].fill_(begins)

    def set_position(self, row: int, position: int) -> None:
        self.positions[row : row + 1].fill_(position)

    def set_bias(self, row: int, biases: dict[int, float]) -> None:
        """What is added to the logits of some tokens; 0 for the others."""
        self.bias[row].zero_()
        tokens, values = self.sent(np.array(list(biases), np.int64)), self.sent(np.array(list(biases.values()), np.float32))
        self.bias[row].index_put_((tokens,), values)

    def send_masks(self, rows: Iterable[int]) -> None:
        """Copy what the host has written of some rows' masks."""
        if rows := list(rows):
            first, end = min(rows), max(rows) + 1
            self.masks[first:end].copy_(self.host_masks[first:end], non_blocking=True)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one row go on in another, and leave its own idle."""
        for each in (self.params, self.bias, self.masks, self.seen, self.answered, self.history, self.table):
            each[target].copy_(each[source])
        for each in (self.ids, self.positions, self.answer_from):
            each[target : target + 1].copy_(each[source : source + 1])
        self.set_position(source, IDLE)
        self._pages[target] = self._pages[source]
        self._pages[source] = []

    def sent(self, values: np.ndarray) -> Tensor:
        """On the GPU, behind what is queued there: the host does not wait."""
        return sent_to(self.device, torch.from_numpy(values))


def sent_to(device: torch.device, values: Tensor) -> Tensor:
    """Numbers of the host on the GPU, behind what is queued there: the host does not wait."""
    return values if device.type != "cuda" else values.pin_memory().to(device, non_blocking=True)
