"""Guesses at the next tokens by a small model with the same tokenizer (speculative decoding, Leviathan et al. 2023).

Its likeliest tokens are computed together with the last one, as guesses from the conversation are (guessing.py). The answer is
sampled from the same logits with the same random numbers as without, so a guess decides only how soon a token comes. What the
small model takes is measured, and so is what its guesses gain: where it costs more it rests, for longer each time.
"""

import logging
from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from ..core.errors import GptqWebuiError
from .guessing import MOST_GUESSES
from .prefix_cache import PrefixCache
from .stepper import Memory, Stepper

log = logging.getLogger(__name__)

PIECE_TOKENS = 256  # of a prompt that are read before a token: cancel is heard between
_SURE = (0.3, 0.5, 0.7, 0.85, 0.95)  # probabilities of a guess that are told apart
_PRIOR = (0.15, 0.35, 0.5, 0.65, 0.8, 0.9)  # how often such a guess is right, before anything is known
_PRIOR_TOKENS = 10.0  # the prior counts as much as so many tokens
_FORGET = 0.99  # of what is known of such a probability, with each guess
_RIGHT = 0.6  # of guesses, before anything is known: whether one more is worth asking for
_LEARN = 0.03  # share of each guess in how often they are right in all
_DOUBT = 0.1  # share of what was known first that comes back with each conversation
_TRIALS = 6  # tokens
_NEWS = 0.2  # share of a new measurement in what is known
_CREDIT = 1.0  # passes that may be lost before a rest
_MOST_BALANCE = 4.0  # passes that are counted as gained: a text that changes is noticed soon
_MOST_MORE = 3.0  # passes: what took longer was disturbed
_REST, _LONGEST_REST = 64, 4096  # tokens without guesses; twice as many each time in a row


class Draft:
    """The small model, for all answers of a large one. For one thread."""

    def __init__(self, stepper: Stepper, context_tokens: int, ids: int) -> None:
        """`context_tokens`: of the small model; `ids`: the large one knows those from 0 to this."""
        self.stepper, self.context_tokens = stepper, context_tokens
        self.ids = min(ids, stepper.embedding_rows or ids)
        self.prefix = PrefixCache(2)  # of conversations that go on
        self.step_s: float | None = None  # of a token
        self._quiet_s: float | None = None  # the same, as it was measured first
        self._right = [_PRIOR_TOKENS * each for each in _PRIOR]
        self._seen = [_PRIOR_TOKENS] * len(_PRIOR)
        self.usual = _RIGHT

    def chance(self, sure: int) -> float:
        """That a guess of this class of probability is right."""
        return self._right[sure] / self._seen[sure]

    def learn(self, sure: int, right: bool) -> None:
        self._right[sure] = self._right[sure] * _FORGET + right
        self._seen[sure] = self._seen[sure] * _FORGET + 1
        self.usual += _LEARN * (right - self.usual)

    def measure(self) -> None:
        """What a token takes, before the first conversation."""
        memory = self.stepper.begin_text(_TRIALS)
        took_s = []
        for id in range(_TRIALS):
            began = perf_counter()
            self.stepper.prefill(memory, [id])
            took_s.append(perf_counter() - began)
        self.step_s = self._quiet_s = min(took_s)

    def begin(self) -> None:
        """Another conversation: it may be unlike those before, and the machine may be quiet again."""
        self.usual += _DOUBT * (_RIGHT - self.usual)
        if self.step_s is not None and self._quiet_s is not None:
            self.step_s += _DOUBT * (self._quiet_s - self.step_s)

    def took(self, took_s: float) -> None:
        """For one token."""
        self.step_s = took_s if self.step_s is None else self.step_s + _NEWS * (took_s - self.step_s)

    def worth(self, costs: Sequence[float], pass_s: float) -> float:
        """Tokens for each pass's time, as usual with the best number of guesses; 1 without any. costs as of `Drafter.guess`."""
        step = (self.step_s or 0.0) / pass_s
        best, expected, chance = 1.0, 1.0, 1.0
        for count in range(1, min(MOST_GUESSES, len(costs) - 1) + 1):
            chance *= self.usual
            expected += chance
            best = max(best, expected / (costs[count] + count * step))
        return best

    def close(self) -> None:
        self.prefix.clear()
        self.stepper.close()


class Drafter:
    """The small model in one conversation. Close it."""

    def __init__(self, draft: Draft, ids: Sequence[int]) -> None:
        self._draft = draft
        draft.begin()
        self._ids = list(ids)
        self._memory: Memory | None = None  # once it was asked
        self._held: list[int] = []  # ids in it: those of the conversation, then guesses
        self._same = 0  # of the first, so many are known to be the conversation's
        self._open: list[tuple[int, int]] = []  # what was guessed last and has not come yet, with its class; last token first
        self._balance = _CREDIT  # passes
        self._charged = 0.0  # for the last guesses' rows, as it was assumed
        self._rests = 0  # tokens without guesses that are to come
        self._rest = _REST  # of the next rest
        self._failed = not all(each < draft.ids for each in self._ids)

    def add(self, id: int) -> None:
        """The token that came next."""
        self._ids.append(id)
        self._failed = self._failed or id >= self._draft.ids
        self._rests -= 1
        if self._open:
            guess, sure = self._open.pop()
            self._draft.learn(sure, guess == id)
            if guess == id:
                self._balance = min(_MOST_BALANCE, self._balance + 1)
            else:
                self._open.clear()
        if self._balance < 0 and not self._open:
            self._rests, self._rest, self._balance = self._rest, min(2 * self._rest, _LONGEST_REST), _CREDIT
        elif self._balance >= _MOST_BALANCE:
            self._rest = _REST

    def worth(self, costs: Sequence[float], pass_s: float | None) -> float:
        """Tokens for each pass's time that guesses may bring now; 1 where none are to be asked for."""
        room = self._draft.context_tokens - len(self._ids)
        if self._failed or pass_s is None or self._rests > 0 or len(costs) < 2 or room < 1:
            return 1.0
        return self._draft.worth(costs, pass_s)

    def guess(self, costs: Sequence[float], pass_s: float) -> list[int]:
        """The tokens that are worth computing now. costs[r]: time of a pass with r more rows, relative to one with none more,
        which takes `pass_s` seconds. At first the prompt is read, and nothing is guessed."""
        try:
            return self._guess(costs, pass_s)
        except (GptqWebuiError, MemoryError) as error:
            log.info("the draft model guesses no more in this conversation: %s", error)
            self._failed = True
            self._memory = None
            return []

    def paid(self, more: float) -> None:
        """What the pass with the last guesses took more than one without them, relative to that one. Measured, so it may err."""
        self._balance -= min(max(more, 0.0), _MOST_MORE) - self._charged
        self._charged = 0.0

    def _guess(self, costs: Sequence[float], pass_s: float) -> list[int]:
        draft = self._draft
        memory = self._ready()
        unread = self._ids[memory.length :]
        self._charged = 0.0
        if len(unread) > PIECE_TOKENS:
            self._read(memory, unread[:PIECE_TOKENS])
            return []
        most = min(MOST_GUESSES, len(costs) - 1, draft.context_tokens - len(self._ids))
        found: list[tuple[int, int]] = []
        began = perf_counter()
        logits, expected, chance = self._read(memory, unread), 1.0, 1.0
        if len(unread) <= 2:
            draft.took(perf_counter() - began)
        while True:
            spent = (perf_counter() - began) / pass_s
            id, sure = self._likeliest(logits)
            chance *= draft.chance(sure)
            before, rows = expected / (costs[len(found)] + spent), costs[len(found) + 1]
            if id >= draft.ids or (expected + chance) / (rows + spent) <= before:
                break
            found.append((id, sure))
            expected += chance
            step, next_chance = (draft.step_s or 0.0) / pass_s, chance * (draft.usual + draft.chance(sure)) / 2
            if len(found) == most or (expected + next_chance) / (costs[len(found) + 1] + spent + step) <= expected / (
                rows + spent
            ):
                break
            step_began = perf_counter()
            logits = self._read(memory, [id])
            draft.took(perf_counter() - step_began)
        self._open = found[::-1]
        self._charged = costs[len(found)] - 1
        if len(unread) <= 1 + MOST_GUESSES:  # to have read the prompt is no cost of these guesses
            self._balance -= min((perf_counter() - began) / pass_s, _MOST_MORE)
        self._balance -= self._charged
        return [id for id, _sure in found]

    def _ready(self) -> Memory:
        """The memory, which holds the beginning of the conversation and nothing else."""
        if self._memory is None:
            self._memory, self._same = self._draft.prefix.take(self._ids)
            self._memory = self._memory or self._draft.stepper.begin_text(len(self._ids))
            self._held = self._ids[: self._same]
        same, most = self._same, min(len(self._held), len(self._ids) - 1)
        while same < most and self._held[same] == self._ids[same]:
            same += 1
        self._same = same = min(same, most)
        self._memory.cut(same)
        del self._held[same:]
        return self._memory

    def _read(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        logits = self._draft.stepper.prefill(memory, ids)
        self._held += ids
        return logits

    def _likeliest(self, logits: Tensor) -> tuple[int, int]:
        """A token, and the class of its probability."""
        highest, at = logits[0].max(0)
        probability = float((highest - logits[0].logsumexp(0)).exp())
        return int(at), sum(probability >= each for each in _SURE)

    def close(self) -> None:
        """What it has read of the conversation is kept for the next turn."""
        if self._memory is not None and not self._failed:
            memory = self._ready()
            self._draft.prefix.keep(self._held, memory)
        self._memory = None
