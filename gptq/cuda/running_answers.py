"""The answers that run on a GPU at the same time: which row each one has, and which tokens were sampled for it.

Tokens are sampled on the GPU, and the next ones are computed while the host reads the last ones: the GPU never waits for
Python. What was computed too much is cut off when an answer ends. Where a row needs the host before it can be sampled (a
grammar, a sampler of PyTorch), all rows are computed first, and sampled once the host is ready.

Where pages run out the youngest answer gives up its own, and reads what it has written again when there are some.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.params import GenerationParams
from ..grammar_mask import GrammarMask
from ..sampling import Sampler
from ..stepper import Memory
from ..token_rules import NO_RULES, TokenRules
from .answer_guesses import AnswerGuesses
from .answer_rows import Answer, Sampled
from .row_probabilities import RowProbabilities
from .row_step import Room, RowStep
from .row_table import RowTable
from .sequences import IDLE


class Answers:
    """Up to `limit` of them, or as many as fit. For one thread."""

    def __init__(self, step: RowStep, room: Room, limit: int = 1, guesses: AnswerGuesses | None = None) -> None:
        """`guesses`: at the next tokens of an answer that runs alone; else every step is of one token for each."""
        self._step, self.room = step, room
        self._table = RowTable(step, limit, self._read_all)
        self._active = self._table.active
        self._pending: deque[Sampled] = deque()
        self._driver: Answer | None = None  # that asked for the last step
        self._guesses = guesses
        self.resume: Callable[[Answer], Iterator[Tensor | None]]  # reads the ids of an answer again -> its last logits at last
        self.launch_prompts: Callable[[], None] = lambda: None  # what is to be read of prompts in this round
        self.is_ready: Callable[[], bool] = lambda: True  # the next step is launched in no time: it need not be recorded first

    def sample(
        self,
        memory: Memory,
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
                        if not self._serve(answer):
                            yield None
                    elif answer.logits is None:
                        yield from self._read_again(answer)
                    elif not self._join(answer, answer.logits) or not answer.sampled:
                        yield None  # the next step is behind its first token by the time that the host waits for it
                host_tokens += 1
                yield answer.sampled.popleft()
        finally:
            answer.left = True
            self.room.leave(answer)
            if answer.row != IDLE:
                self._retire(answer)
            del answer.memory  # tokens of it that nobody has read would keep it
            # the last token that the host has seen may not belong to the answer
            self.room.shorten(memory, answer.prompt + max(0, host_tokens - 1))

    @property
    def busy(self) -> bool:
        """Whether answers are being sampled."""
        return bool(self._active)

    def close(self) -> None:
        """Forget what is running."""
        self._pending.clear()
        self._table.clear()
        self._driver = None

    def _serve(self, answer: Answer) -> bool:
        """See to the next token of an answer. False if it comes with a step that another one asks for.

        One answer asks for all, and in every round of the worker once: nobody is computed ahead of what is taken.
        """
        if answer.joined is not None:
            self._read_first(answer)
        elif self._driver is not None and self._driver is not answer:
            return False
        else:
            self._driver = answer
            self._advance()
        return True

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
            self._launch_next()
        if len(self._pending) == 1 and not self._pending[0].guesses:  # the next step is behind it, but for one with guesses
            self._launch_next()
        guessed = any(each.guesses for each in self._pending)
        self._read_oldest()
        if guessed and not self._pending:
            self._launch_next()  # the GPU goes on while what it has sampled is taken

    def _launch_next(self) -> None:
        """A step of all, or where it is worth more one of the only answer with guesses."""
        if self._guesses is not None and (asked := self._guesses.ask(self._active, self._pending)) is not None:
            self._pending.append(asked)
        else:
            self._launch()

    def _launch(self, sample_next: bool = True) -> list[Answer]:
        """Compute the tokens of all answers, and sample the next ones unless that is left to `_choose`."""
        while any(each.guesses for each in self._pending):  # how many tokens those are says where the next one is
            self._read_oldest()
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
        self._table.close_gaps()
        if not self._active:
            return []
        self._step.sequences.show((each.memory, each.row) for each in changed if each.row != IDLE)
        adapters = {each.row: each.memory.adapter for each in self._active}
        self._step.step_rows(self._table.end, sample_next, adapters)
        for each in self._active:
            self.room.grown(each.memory)
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

    def _read_first(self, answer: Answer) -> None:
        """An answer's first token, which the steps before it need not be read for."""
        if not any(each.is_step for each in self._pending) and self._table.goes_on and self.is_ready():
            self._launch()  # the GPU goes on meanwhile
        self.launch_prompts()
        if answer.joined is not None:
            self._pending.remove(answer.joined)
            self._read(answer.joined)

    def _read_oldest(self) -> None:
        if self._pending:
            self._read(self._pending.popleft())

    def _read(self, sampled: Sampled) -> None:
        sampled.mark.synchronize()
        if sampled.guesses and self._guesses is not None:
            for id in self._guesses.read(sampled):
                self._take(sampled.answers[0], id, ())
            return
        ids = self._step.sequences.host_tokens.numpy()[sampled.rows, sampled.columns].tolist()
        found = sampled.found.read() if sampled.found is not None else {}
        for each, row, id in zip(sampled.answers, sampled.rows, ids, strict=True):
            each.joined = None
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
        answer.room = self.room.capacity_of(answer.memory)
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
        if not self._table.give(answer):
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
            answer.joined = self._pending[-1]
        else:
            self._sample_by_torch(answer)
        return True

    def _retire(self, answer: Answer) -> None:
        """Take an answer's row away."""
        self._table.take(answer)
        if self._driver is answer:
            self._driver = None
