"""The state on the GPU of each sequence that is being continued: row i of every tensor is the i-th sequence."""

import torch
from torch import Tensor

from .kernel_arguments import HOST_TOKENS, SAMPLE_PARAMS
from .kv_pages import PagedMemory
from .model_shape import ModelShape


class Sequences:
    """State of up to `parallel` sequences. `table` has one row more, for the prompt that is being read (`prompt_row`)."""

    def __init__(self, device: torch.device, shape: ModelShape, parallel: int) -> None:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.shape, self.parallel, self.prompt_row = shape, parallel, parallel
        vocabulary, context = shape.vocabulary, shape.context_tokens
        self.ids, self.positions = zeros(parallel), zeros(parallel)  # of the token that is computed next
        self.logits = zeros(parallel, vocabulary, dtype=torch.float32)
        self.table = zeros(parallel + 1, shape.max_pages, dtype=torch.int64)  # addresses of pages
        # what the sampler reads and writes: see SampleArguments
        self.params = zeros(parallel, SAMPLE_PARAMS.size_bytes, dtype=torch.uint8)
        self.bias = zeros(parallel, vocabulary, dtype=torch.float32)
        self.seen = zeros(parallel, vocabulary, dtype=torch.int16)
        self.answered = zeros(parallel, vocabulary, dtype=torch.int16)
        self.history = zeros(parallel, context)
        self.answer_from = zeros(parallel)
        self.work = zeros(parallel, vocabulary, dtype=torch.float32)
        self.host_tokens = torch.zeros(parallel, HOST_TOKENS, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._pages: list[list[int]] = [[] for _ in range(parallel + 1)]  # what `table` holds

    def use(self, memory: PagedMemory, tokens: int, row: int = 0) -> None:
        """Make `memory` the one that a row reads and writes, with pages for that many tokens.

        Raises torch.OutOfMemoryError, and ValueError for more tokens than the context has.
        """
        if tokens > self.shape.context_tokens:
            raise ValueError(f"{tokens} tokens were to be kept; the context has {self.shape.context_tokens}.")
        memory.reserve(tokens)
        pages, before = memory.pages, self._pages[row]
        if pages == before:
            return
        same = len(before) if pages[: len(before)] == before else 0
        self.table[row, same : len(pages)] = torch.tensor(pages[same:], dtype=torch.int64).to(self.table.device)
        self._pages[row] = list(pages)

    def set_params(self, row: int, packed: bytes) -> None:
        """How a row's tokens are sampled: a packed SAMPLE_PARAMS."""
        self.params[row].copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8))

    def set_history(self, row: int, ids: Tensor, repetition_range: int) -> None:
        """The prompt int64 [n] before a row's first sampled token. The penalties look back at `repetition_range` tokens;
        0 for all."""
        vocabulary, count = self.shape.vocabulary, ids.numel()
        self.history[row, :count] = ids
        recent = ids[-repetition_range:]  # a range of 0 is all of them
        self.seen[row] = torch.bincount(recent, minlength=vocabulary).clamp(max=32767)[:vocabulary].to(torch.int16)
        self.answered[row].zero_()
        self.answer_from[row] = count
        self.positions[row] = count - 1

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one row go on in another."""
        for each in (self.params, self.bias, self.seen, self.answered, self.history, self.table):
            each[target].copy_(each[source])
        for each in (self.ids, self.positions, self.answer_from):
            each[target : target + 1].copy_(each[source : source + 1])
        self._pages[target] = self._pages[source]
        self._pages[source] = []
