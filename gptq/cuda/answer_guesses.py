"""Guesses at the next tokens of an answer that runs alone (guessing.py): when they are made, and what they cost.

A step with guesses may be launched while the one before it runs: they are guesses then at what follows a token that is not
known yet. So nothing waits where guesses are few.
"""

import logging
import math
from collections.abc import Collection, Sequence

import torch

from ..guessing import MOST_GUESSES, Guesser
from .answer_rows import Answer, Sampled
from .cuda_step import CudaStep
from .guessed_step import rows_of
from .kernel_arguments import ONE_ROWS

log = logging.getLogger(__name__)

_ATTENTION = 0.027  # of a step of one row, for each 1,000 tokens before it
_SHARED = 0.7  # share of that which each row more takes: the rows read the same keys
_SHORT = 0.047  # of a step of one row, which a short one takes less: no step with guesses has its attention (attention.py)
_WAIT = 0.04  # that the GPU waits for the host between two steps with guesses
_STEPS = 20  # for each whole: a cost is rounded up, so that a noisy measurement seldom changes which guesses are made


class AnswerGuesses:
    """For one thread."""

    def __init__(self, step: CudaStep) -> None:
        self._step = step
        self._cost: dict[int, float] | None = None  # of the products of so many rows, relative to one: measured when needed
        self._running: torch.cuda.Event | None = None  # of the last step with guesses

    def ask(self, answers: Sequence[Answer], pending: Collection[Sampled] = ()) -> Sampled | None:
        """Launch the next step with guesses, if these are worth it; it counts in the answer's memory as one token yet.

        `pending`: what the host has not read. After a step with guesses it has to, to know where the next one is.
        """
        answer = answers[0] if len(answers) == 1 and not any(each.guesses for each in pending) else None
        if answer is None or answer.row != 0 or not self._may_guess(answer):
            return None
        unknown = answer.next - len(answer.ids)  # sampled tokens that the host has not read
        if unknown > 1:
            return None
        if answer.guesser is None:
            answer.guesser = Guesser(answer.ids[: answer.guessed_from])
        for id in answer.ids[answer.guessed_from :]:
            answer.guesser.add(id)
        answer.guessed_from = len(answer.ids)
        if not answer.guesser.matches:
            return None
        costs = self._costs(self._cost or self._measure(), answer)
        found = answer.guesser.guess(costs, after=unknown)
        if len(found) <= unknown or not self._has_pages(answer, len(found) - unknown):
            return None
        return self._launch(answer, found[unknown:])

    def _may_guess(self, answer: Answer) -> bool:
        known = answer.params.logprobs is None and answer.memory.adapter is None and not answer.needs_host
        return known and self._step.sequences.rows >= ONE_ROWS

    def _costs(self, products: dict[int, float], answer: Answer) -> list[float]:
        """Of a step with so many guesses, as `Guesser.guess` takes them. Once the products are measured they depend on the
        context alone: a seed gives the same answer again."""
        room = min(MOST_GUESSES, ONE_ROWS - 1, self._step.shape.context_tokens - answer.memory.length - 1)
        attention = _ATTENTION * answer.memory.length / 1000
        one = 1 + attention - (_SHORT if answer.memory.length < self._step.guessed.short_tokens else 0)

        def cost(rows: int) -> float:
            return (products[rows] + _WAIT + attention * (1 + _SHARED * (rows - 1))) / one

        return [1.0, *(cost(rows_of(count)) for count in range(1, room + 1))]

    def _measure(self) -> dict[int, float]:
        found = self._step.guessed.relative_costs(self._step.step)
        self._cost = {rows: math.ceil(cost * _STEPS) / _STEPS for rows, cost in found.items()}
        log.info("guessed tokens: steps of %s rows take %s of one row's", *zip(*self._cost.items(), strict=True))
        return self._cost

    def _has_pages(self, answer: Answer, guesses: int) -> bool:
        """Pages for the last token and the guesses. Nobody gives up any for guesses."""
        try:
            answer.memory.reserve(answer.memory.length + 1 + guesses)
        except torch.OutOfMemoryError:
            return False
        answer.room = answer.memory.capacity
        self._step.sequences.show([(answer.memory, answer.row)])
        return True

    def _launch(self, answer: Answer, guesses: Sequence[int]) -> Sampled:
        if self._running is not None:
            self._running.synchronize()  # what it reads of the host is written anew
        self._step.guessed.step(answer.memory.length, guesses)
        self._running = self._step.mark()
        sampled = Sampled(self._running, [answer], None, True, guesses=len(guesses))
        answer.memory.length += 1
        answer.next += 1
        return sampled

    def read(self, sampled: Sampled) -> list[int]:
        """What a step with guesses has sampled, if its answer still goes on."""
        (answer,) = sampled.answers
        if answer.left or answer.ended or answer.error is not None:
            return []
        position = answer.memory.length - 1
        ids = self._step.guessed.sampled(position, sampled.guesses + 1)
        answer.memory.length = position + len(ids)
        answer.next = position + 1 + len(ids)
        return ids
