"""The answers that run at the same time and are sampled by torch: their tokens are computed in one pass over the weights.

Each answer samples in its turn. The first one that needs logits lets the tokens of all that wait be computed with its own,
and guesses at what comes next (guessing.py) beside them: to read the weights costs much more than another row.
"""

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor

from .drafting import Draft, Drafter
from .guessing import MOST_GUESSES, Guesser
from .reading_turns import Turns
from .running import Running
from .stepper import Memory, Reading
from .token_ids import require_known

MOST_ROWS = 16  # of a pass in which each row gets logits
_ROW_COST = 0.2  # of a row more, before it is measured; relative to a pass of one row
_NEWS = 0.1  # share of a new measurement in what is known
_DOUBT = 0.01  # share of the assumed cost that comes back with each pass that measures none: one slow pass is no rule


class Batch:
    """For one thread."""

    def __init__(
        self,
        compute: Callable[[Sequence[tuple[Memory, Sequence[int]]]], Tensor],
        context_tokens: int,
        embedding_rows: int | None,
        guesses: bool = True,
    ) -> None:
        """`compute`: ids that follow those in each memory, MOST_ROWS in all -> their logits [ids, V]. Without `guesses` a pass
        computes the tokens that were sampled, and no others."""
        self._compute, self._context_tokens = compute, context_tokens
        self.embedding_rows, self.guesses = embedding_rows, guesses
        self.draft: Draft | None = None  # a small model that guesses for an answer that runs alone
        self._running: list[BatchedAnswer] = []
        self._one_s: float | None = None  # a pass of one row
        self._row_cost = _ROW_COST

    def join(self, memory: Memory, ids: Sequence[int]) -> "BatchedAnswer":
        """An answer to the prompt `ids`, all of which are in memory."""
        self._running.append(answer := BatchedAnswer(self, memory, ids))
        return answer

    def leave(self, answer: "BatchedAnswer") -> None:
        if answer in self._running:
            self._running.remove(answer)

    @property
    def busy(self) -> bool:
        """Whether answers are being sampled."""
        return bool(self._running)

    def advance(self, first: "BatchedAnswer") -> None:
        """Compute the token of an answer, and of the next ones that wait for theirs: as many as a pass takes."""
        at = self._running.index(first)
        around = [*self._running[at:], *self._running[:at]]
        waiting = [each for each in around if each.pending is not None][:MOST_ROWS]
        rows = len(waiting)
        pieces: list[tuple[Memory, Sequence[int]]] = []
        for answer in waiting:
            free = min(MOST_ROWS - rows, MOST_GUESSES, self._context_tokens - answer.memory.length - 1)
            before = 1 + self._row_cost * (rows - 1)
            costs = [1 + self._row_cost * more / before for more in range(max(0, free) + 1)]
            guesses = self._guess(answer, costs) if self.guesses else []
            rows += len(guesses)
            pieces.append((answer.memory, [answer.pending or 0, *guesses]))
        began = perf_counter()
        try:
            logits = self._compute(pieces)
        except BaseException:
            for answer in waiting:  # their tokens are still to be computed, also those that were before it failed
                answer.memory.cut(answer.length)
            raise
        took_s = perf_counter() - began
        self._measured(rows, took_s)
        if len(pieces) == 1 and rows > 1 and self._one_s is not None:
            answer = waiting[0]
            (answer.drafter if answer.drafter is not None and answer.drafted else answer.guesser).paid(took_s / self._one_s - 1)
        at = 0
        for answer, (_memory, ids) in zip(waiting, pieces, strict=True):
            answer.computed(ids[1:], logits[at : at + len(ids)])
            at += len(ids)

    def _guess(self, answer: "BatchedAnswer", costs: Sequence[float]) -> list[int]:
        """By what the conversation holds, or by the draft model where that is worth more."""
        found = answer.guesser.guess(costs)
        drafter, answer.drafted = answer.drafter, False
        if drafter is None or self._one_s is None or len(self._running) > 1:
            return found
        if drafter.worth(costs, self._one_s) <= (answer.guesser.speed if found else 1.0):
            return found
        guesses = drafter.guess(costs, self._one_s)
        answer.drafted = bool(guesses)
        return guesses or found

    def _measured(self, rows: int, took_s: float) -> None:
        if rows == 1:
            self._one_s = took_s if self._one_s is None else self._one_s + _NEWS * (took_s - self._one_s)
            self._row_cost += _DOUBT * (_ROW_COST - self._row_cost)
        elif self._one_s is not None:
            found = (took_s / self._one_s - 1) / (rows - 1)
            self._row_cost += _NEWS * (min(max(found, 0.02), 1.0) - self._row_cost)


class BatchedAnswer(Running):
    def __init__(self, batch: Batch, memory: Memory, ids: Sequence[int]) -> None:
        self.memory = memory
        self.guesser = Guesser(ids if batch.guesses else ())
        self.drafter = None if batch.draft is None else Drafter(batch.draft, ids)
        self.drafted = False  # the last guesses are the drafter's
        self.pending: int | None = None  # the given id, if it is not computed
        self._batch = batch
        self._length = len(ids)  # tokens in memory that belong to the answer
        self._ready: Tensor | None = None  # logits after the given id
        self._ahead: deque[tuple[int, Tensor]] = deque()  # guessed ids that are computed, with the logits after each

    @property
    def length(self) -> int:
        """Tokens in memory that belong to the answer."""
        return self._length

    def give(self, id: int) -> None:
        require_known([id], self._batch.embedding_rows)  # here, where it ends this answer only
        if self._batch.guesses:
            self.guesser.add(id)
        if self.drafter is not None:
            self.drafter.add(id)
        if self._ahead and self._ahead[0][0] == id:
            self._ready = self._ahead.popleft()[1]
            self._length += 1
            return
        self._ahead.clear()
        self._ready = None
        self.memory.cut(self._length)
        self.pending = id

    def computed(self, guesses: Sequence[int], logits: Tensor) -> None:
        """The pending id and guesses after it are in memory; `logits` [1 + guesses, V] are overwritten by the next pass."""
        kept = logits.clone()
        self.pending, self._ready = None, kept[:1]
        self._length += 1
        self._ahead = deque((id, kept[at : at + 1]) for at, id in enumerate(guesses, 1))

    def logits(self) -> Tensor:
        if self._ready is None:
            self._batch.advance(self)
        assert self._ready is not None
        return self._ready

    def close(self) -> None:
        self._batch.leave(self)
        self.memory.cut(self._length)
        if self.drafter is not None:
            self.drafter.close()


class PromptReading(Reading):
    """Of a prompt that takes its turn among others (reading_turns.py)."""

    def __init__(self, turns: Turns, read: Callable[[Sequence[int]], Tensor], left: Callable[[], int] = lambda: 0) -> None:
        """`left`: tokens that are still to be read, where a piece more costs so much that one round reads them all if it can."""
        self._turns, self._turn = turns, turns.join()
        super().__init__(lambda: self._turn.tokens(left()), read)

    def ask(self, ids: Sequence[int]) -> None:
        began = perf_counter()
        super().ask(ids)
        self._turns.measured(len(ids), perf_counter() - began)
        self._turn.took(len(ids))

    def spent(self, tokens: int) -> None:
        self._turn.took(tokens)

    def close(self) -> None:
        self._turn.close()
