"""The answers that run on a GPU at the same time: which row each one has, and which tokens were sampled for it.

Tokens are sampled on the GPU, and the next ones are computed while the host reads the last ones: the GPU never waits for
Python. What was computed too much is cut off when an answer ends. Where a row needs the host before it can be sampled (a
grammar, a sampler of PyTorch), all rows are computed first, and sampled once the host is ready.

Where pages run out the youngest answer gives up its own, and reads what it has written again when there are some.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.chat import Step
from ...core.params import GenerationParams
from ..grammar_mask import GrammarMask
from ..sampling import Sampler
from ..token_rules import NO_RULES, TokenRules
from .answer_rows import Answer, Sampled
from .batch_step import rows_of_graph
from .cuda_step import CudaStep
from .kv_pages import PagedMemory
from .page_room import PageRoom
from .row_probabilities import RowProbabilities
from .sequences import IDLE

log = logging.getLogger(__name__)


class Answers:
    """Up to `limit` of them, or as many as fit. For one thread."""

    def __init__(self, step: CudaStep, room: PageRoom, limit: int = 1) -> None:
        self._step, self.room, self._limit = step, room, limit
        self._active: list[Answer] = []  # that have a row, the one that joined first first
        self._rows: dict[int, Answer] = {}
        self._pending: deque[Sampled] = deque()
        self._host: np.ndarray | None = None  # what is in sequences.host_tokens
        self.resume: Callable[[Answer], Iterator[Tensor | None]]  # reads the ids of an answer again -> its last logits at last

    def sample(
        self,
        memory: PagedMemory,
        logits: Tensor,
        ids: Sequence[int],
        params: GenerationParams,
        rules: TokenRules = NO_RULES,
        mask: GrammarMask | None = None,
    ) -> Generator[Step | None, None, None]:
        """Steps without an end, until the context is full or nothing may follow. Others may be sampled in turns with it; None
        where it waits for them. Close it."""
        answer = Answer(self.room.number(), self.suspend, memory, ids, logits, params, rules, mask)
        if not params.in_one_pass:
            answer.sampler = Sampler(params, self._step.device, prompt_tokens=answer.prompt, rules=rules)
        host_tokens = 0
        self.room.hold(answer)
        try:
            while True:
                while not answer.sampled:
                    if answer.error is not None:
                        raise answer.error
                    if answer.ended:
                        return
                    if answer.row != IDLE:
                        self._advance()
                    elif answer.logits is None:
                        yield from self._read_again(answer)
                    elif not self._join(answer, answer.logits):
                        yield None
                host_tokens += 1
                yield answer.sampled.popleft()
        finally:
            answer.left = True
            self.room.leave(answer)
            if answer.row != IDLE:
                self._retire(answer)
            del answer.memory  # tokens of it that nobody has read would keep it
            # the last token that the host has seen may not belong to the answer
            memory.length = min(memory.length, answer.prompt + max(0, host_tokens - 1))

    @property
    def busy(self) -> bool:
        """Whether answers are being sampled."""
        return bool(self._active)

    def close(self) -> None:
        """Forget what is running."""
        self._pending.clear()
        self._active.clear()
        self._rows.clear()
        self._host = None

    # -- one step of all -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read the oldest sampled tokens while the next step runs."""
        if any(each.needs_host for each in self._active):
            computed = self._launch(sample_next=False)
            self._read_all()
            if computed:
                self._choose([each for each in computed if each.row != IDLE])
            return
        if not self._pending or not self._pending[-1].is_step:
            self._launch()
        if len(self._pending) == 1:
            self._launch()
        self._read_oldest()
        while len(self._pending) > 1 and self._pending[0].mark.query():
            self._read_oldest()

    def _launch(self, sample_next: bool = True) -> list[Answer]:
        """Compute the tokens of all answers, and sample the next ones unless that is left to `_choose`."""
        changed = []
        for each in list(self._active):
            if each.row == IDLE:  # it has just given up its pages
                continue
            if each.memory.length >= self._step.shape.context_tokens:
                self._read_all()
                self._retire(each)
                each.ended = True
            elif each.memory.length >= each.room and self._reserve(each):
                changed.append(each)
        self._close_gaps()
        if not self._active:
            return []
        self._step.sequences.show((each.memory, each.row) for each in changed if each.row != IDLE)
        self._step.step_rows(max(self._rows) + 1, sample_next, {row: each.memory.adapter for row, each in self._rows.items()})
        for each in self._active:
            each.memory.length += 1
        if sample_next:
            self._note_sampled(self._active)
        return list(self._active)

    def _choose(self, answers: Sequence[Answer]) -> None:
        """Sample what `_launch` has left at the logits. The host has read every earlier token."""
        self._step.sequences.send_masks([each.row for each in answers if each.masked])
        if answers:
            self._step.sample(0, max(each.row for each in answers) + 1)
        self._note_sampled([each for each in answers if each.sampler is None])
        for each in answers:
            if each.sampler is not None:
                self._sample_by_torch(each)

    def _sample_by_torch(self, answer: Answer) -> None:
        """In the place of what the kernel has chosen."""
        answer.next += 1
        self._take(answer, *answer.choose(self._step.sequences))

    def _note_sampled(self, answers: Sequence[Answer], is_step: bool = True) -> None:
        if not answers:
            return
        wanted = {each.row: each.params.logprobs for each in answers if each.params.logprobs is not None}
        found = RowProbabilities(self._step.sequences, wanted) if wanted else None
        self._pending.append(Sampled(self._step.mark(), list(answers), found, is_step))
        for each in answers:
            each.next += 1

    def _read_all(self) -> None:
        while self._pending:
            self._read_oldest()

    def _read_oldest(self) -> None:
        if not self._pending:
            return
        sampled = self._pending.popleft()
        sampled.mark.synchronize()
        if self._host is None:
            self._host = self._step.sequences.host_tokens.numpy()
        ids = self._host[sampled.rows, sampled.columns].tolist()
        found = sampled.found.read() if sampled.found is not None else {}
        for each, row, id in zip(sampled.answers, sampled.rows, ids, strict=True):
            if not each.left and not each.ended and each.error is None:
                self._take(each, id, found.get(row, ()))

    def _take(self, answer: Answer, id: int, found: Any) -> None:
        """The host knows an answer's next token, and `found` of its probabilities."""
        answer.ids.append(id)
        if answer.mask is not None:
            try:
                answer.mask.take(id)
                answer.ended = answer.mask.complete
                if not answer.ended and answer.masked:
                    answer.write_mask(self._step.sequences)
            except Exception as error:
                answer.error = error
                self._retire(answer)
                return
            if answer.ended:
                self._retire(answer)
        answer.sampled.append(Step(id, *found))

    # -- pages -----------------------------------------------------------------------------------------------------

    def _reserve(self, answer: Answer) -> bool:
        """Pages for one token more; False if it gave up its own, or cannot have them."""
        try:
            if not self.room.extend(answer, answer.memory.length + 1):
                return False
        except torch.OutOfMemoryError as error:
            self._read_all()
            answer.error = error
            self._retire(answer)
            return False
        answer.room = answer.memory.capacity
        return True

    def suspend(self, answer: Answer) -> None:
        """Take an answer's row and pages away."""
        self._read_all()
        if answer.row != IDLE:
            self._retire(answer)
        answer.memory.restart()
        answer.logits = None

    def _read_again(self, answer: Answer) -> Iterator[None]:
        if len(answer.ids) > self._step.shape.context_tokens:
            answer.ended = True
            return
        for logits in self.resume(answer):
            if logits is None:
                yield None
            else:
                answer.logits = logits
        self.room.hold(answer)

    # -- joining and leaving ---------------------------------------------------------------------------------------

    def _join(self, answer: Answer, logits: Tensor) -> bool:
        """Give an answer a row and sample its next token from its last logits [1, V]. False if there is no row for it yet."""
        if not self._find_row(answer):
            return False
        sequences, row = self._step.sequences, answer.row
        try:
            answer.prepare(sequences)
            if answer.masked:
                answer.write_mask(sequences)
                sequences.send_masks([row])
        except Exception:
            self._retire(answer)
            raise
        answer.room, answer.logits = 0, None  # its last page may be shared
        answer.next = len(answer.ids)
        sequences.show([(answer.memory, row)])
        sequences.logits[row].copy_(logits[0])
        self._step.sample(row, 1)
        if answer.sampler is None:
            self._note_sampled([answer], is_step=False)
        else:
            self._sample_by_torch(answer)
        return True

    def _find_row(self, answer: Answer) -> bool:
        rows = self._step.sequences.rows
        free = next((row for row in range(rows) if row not in self._rows), None)
        if free is None:
            if rows >= self._limit or not self._grow(min(self._limit, 2 * rows)):
                return False
            free = rows
        answer.row = free
        self._rows[free] = answer
        self._active.append(answer)
        self._active.sort(key=lambda each: each.number)
        return True

    def _grow(self, rows: int) -> bool:
        self._read_all()
        try:
            self._step.grow(rows)
        except torch.OutOfMemoryError:
            self._limit = self._step.sequences.rows
            log.info("answers at once are limited to %d: the GPU is nearly full", self._limit)
            return False
        self._host = None
        return True

    def _retire(self, answer: Answer) -> None:
        """Take an answer's row away."""
        self._active.remove(answer)
        del self._rows[answer.row]
        self._step.sequences.set_position(answer.row, IDLE)
        answer.row = IDLE

    def _close_gaps(self) -> None:
        """Move the last answers into rows that were left, where fewer rows are computed then."""
        if not self._rows or rows_of_graph(max(self._rows) + 1) == rows_of_graph(len(self._rows)):
            return
        self._read_all()  # what is pending is at the rows as they are
        while self._rows and rows_of_graph((last := max(self._rows)) + 1) > rows_of_graph(len(self._rows)):
            free = next(row for row in range(last) if row not in self._rows)
            answer = self._rows.pop(last)
            sequences = self._step.sequences
            sequences.move(last, free)
            sequences.host_masks[free].copy_(sequences.host_masks[last])
            self._rows[free] = answer
            answer.row = free
