"""The answers that run on a GPU at the same time: which row each one has, and which tokens were sampled for it.

Tokens are sampled on the GPU, and the next ones are computed while the host reads the last ones: the GPU never waits for
Python. What was computed too much is cut off when an answer ends.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.errors import BadParameter
from ...core.params import GenerationParams
from ..prefix_cache import PrefixCache
from ..sampling import log_probabilities
from .cuda_step import CudaStep
from .kernel_arguments import HOST_TOKENS
from .kv_pages import PagedMemory
from .sample import packed_params, sample


class Answer:
    """A running one. Its tokens before the sampled ones are in its memory."""

    def __init__(self, memory: PagedMemory, prompt: int, params: GenerationParams, row: int) -> None:
        self.memory, self.prompt, self.params = memory, prompt, params
        self.row = row
        self.next = prompt  # position of the next token to be sampled
        self.sampled: deque[Step] = deque()  # that its consumer has not taken yet
        self.error: Exception | None = None
        self.full = False  # its memory holds the whole context


class Answers:
    """Up to `sequences.parallel` of them. For one thread."""

    def __init__(self, step: CudaStep) -> None:
        self._step = step
        self._active: list[Answer] = []  # the answer of row i is at i
        self._pending: deque[tuple[torch.cuda.Event, list[tuple[Answer, int]]]] = deque()  # sampled, not yet read by the host
        self.prefix: PrefixCache | None = None  # what may be released for pages

    def sample(
        self, memory: PagedMemory, logits: Tensor, ids: Sequence[int], params: GenerationParams, banned: Collection[int] = ()
    ) -> Iterator[Step]:
        """Steps without an end, until the context is full. Others may be sampled in turns with it. Close it."""
        answer = self._join(memory, logits, ids, params, banned)
        host_tokens = 0
        try:
            while True:
                while not answer.sampled:
                    if answer.full:
                        return
                    self._advance()
                    if answer.error is not None:
                        raise answer.error
                host_tokens += 1
                yield answer.sampled.popleft()
        finally:
            self._leave(answer)
            # the last token that the host has seen may not belong to the answer
            memory.length = min(memory.length, answer.prompt + max(0, host_tokens - 1))

    def close(self) -> None:
        """Forget what is running."""
        self._pending.clear()
        self._active.clear()

    # -- one step of all -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read the oldest sampled tokens while the next step runs."""
        if not self._pending:
            self._launch()
        if len(self._pending) == 1 and all(each.params.logprobs is None for each in self._active):
            self._launch()
        self._read_oldest()

    def _launch(self) -> None:
        for each in list(self._active):
            if each.memory.length >= self._step.shape.context_tokens:
                self._retire(each)
                each.full = True
            elif not self._reserve(each):
                self._retire(each)
        if not self._active:
            return
        self._step.step_rows(len(self._active))
        for each in self._active:
            each.memory.length += 1
        self._note_sampled(self._active)

    def _note_sampled(self, answers: Sequence[Answer]) -> None:
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, [(each, each.next) for each in answers]))
        for each in answers:
            each.next += 1

    def _read_oldest(self) -> None:
        if not self._pending:
            return
        event, answers = self._pending.popleft()
        event.synchronize()
        sequences = self._step.sequences
        for each, position in answers:
            id = int(sequences.host_tokens[each.row, position % HOST_TOKENS])
            wanted = each.params.logprobs
            found: Any = () if wanted is None else log_probabilities(sequences.logits[each.row : each.row + 1], id, wanted)
            each.sampled.append(Step(id, *found))

    def _reserve(self, answer: Answer) -> bool:
        """Room for one token more; earlier conversations are released for it."""
        for _ in range(2):
            try:
                self._step.sequences.use(answer.memory, answer.memory.length + 1, answer.row)
                return True
            except torch.OutOfMemoryError as error:
                failed = error
                if self.prefix is not None:
                    self.prefix.clear()
        answer.error = failed
        return False

    # -- joining and leaving ---------------------------------------------------------------------------------------

    def _join(
        self, memory: PagedMemory, logits: Tensor, ids: Sequence[int], params: GenerationParams, banned: Collection[int]
    ) -> Answer:
        answer = Answer(memory, len(ids), params, len(self._active))
        sequences = self._step.sequences
        self._prepare(answer.row, ids, params, banned)
        sequences.use(memory, memory.length, answer.row)
        sequences.logits[answer.row].copy_(logits[0])
        sample(self._step.gpu, sequences, answer.row)
        self._active.append(answer)
        self._note_sampled([answer])
        if params.logprobs is not None:
            self._read_all()
        return answer

    def _read_all(self) -> None:
        while self._pending:
            self._read_oldest()

    def _leave(self, answer: Answer) -> None:
        if answer in self._active:
            self._retire(answer)

    def _retire(self, answer: Answer) -> None:
        """Take an answer's row away; the last row moves there."""
        self._read_all()
        last = self._active.pop()
        if last is not answer:
            self._active[answer.row] = last
            self._step.sequences.move(last.row, answer.row)
            last.row = answer.row

    def _prepare(self, row: int, ids: Sequence[int], params: GenerationParams, banned: Collection[int]) -> None:
        """Give the GPU an answer's parameters and what precedes it. Raises BadParameter for a bias on no token."""
        sequences = self._step.sequences
        vocabulary, device = self._step.shape.vocabulary, sequences.bias.device
        if params.logit_bias and params.logit_bias[-1][0] >= vocabulary:
            raise BadParameter(
                f"logit_bias names token {params.logit_bias[-1][0]}; the model's tokens are 0 to {vocabulary - 1}."
            )
        seed = params.seed if params.seed is not None else int(torch.randint(0, 2**62, ()))
        biases = dict(params.logit_bias) | {id: -math.inf for id in banned if 0 <= id < vocabulary}
        sequences.set_params(row, packed_params(params, seed, bool(banned)))
        if biases:
            sequences.bias[row].zero_()
            tokens = torch.tensor(list(biases), device=device)
            sequences.bias[row, tokens] = torch.tensor(list(biases.values()), device=device)
        sequences.set_history(row, torch.tensor(list(ids), device=device), params.repetition_range)
