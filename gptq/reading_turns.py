"""Whose prompt is read next, where several wait and answers are sampled meanwhile.

The worker goes round all answers. In each round the sampled ones get their tokens, and prompts are read only so far that no
stream pauses too long: how much that is, is measured. Of the prompts that wait the one that has got the least comes first,
counted from when it came: a short one beside long ones is read at once.
"""

from collections.abc import Callable
from itertools import count
from time import perf_counter

PAUSE_S = 0.035  # that prompts may take between two tokens of the answers
_LONGEST_S = 0.1  # of a round with its step, where many wait
# Where so many prompts wait, a round reads so much more: it also computes a step of the others.
CROWD, LARGE_CROWD = (4, 1.5), (8, 2.6)
_FIRST_TOKENS = 512  # of a round, before anything is measured
_FEWEST_TOKENS = 64


class Turn:
    """Of one prompt, until it is closed."""

    read = False  # something of it
    blocked = False  # it waits for something else, and nobody for it

    def __init__(self, turns: "Turns", share: int, number: int) -> None:
        self.share, self.number = share, number  # tokens that it has got; the order of arrival
        self._turns = turns

    def tokens(self, wanted: int = 0) -> int:
        """How many it may read now; 0 if others come first. `wanted`: all that are left of it, if it says so. Those that a whole
        round has room for are not read in two parts."""
        return self._turns._ask(self, wanted)

    def took(self, tokens: int) -> None:
        """So many were read of those that it was given."""
        self.share += tokens
        self.read = True
        self._turns._left -= tokens
        self._turns._read += tokens

    def close(self) -> None:
        self._turns._close(self)


class Turns:
    """For one thread."""

    def __init__(
        self,
        busy: Callable[[], bool],
        most_tokens: Callable[[], int],
        first_tokens: int = _FIRST_TOKENS,
        fewest_tokens: int = _FEWEST_TOKENS,
        crowds: tuple[tuple[int, float], ...] = (CROWD,),
    ) -> None:
        """`busy`: whether answers are sampled meanwhile; `most_tokens`: of a piece; of a round, `first_tokens` before anything
        is measured and `fewest_tokens` in any case. `crowds`: how much more where so many wait, the largest first."""
        self._busy, self._most, self._fewest, self._crowds = busy, most_tokens, fewest_tokens, crowds
        self._waiting: list[Turn] = []
        self._asked: set[int] = set()  # numbers of those that have asked in this round
        self._numbers = count()
        self._left = 0  # tokens that may still be read in this round
        self._began: float | None = None  # this round, on perf_counter()
        self._read = 0  # tokens of this round
        self._rest_s = 0.0  # what a round takes beside its prompts: a step of the others
        self.tokens = first_tokens  # that take PAUSE_S

    @property
    def is_alone(self) -> bool:
        """Whether no more than one prompt is being read."""
        return len(self._waiting) <= 1

    @property
    def is_crowded(self) -> bool:
        """Whether so many prompts wait that a round reads as much as streams can bear."""
        return self._share == LARGE_CROWD[1]

    @property
    def _share(self) -> float:
        waiting = sum(not each.blocked for each in self._waiting)
        return next((share for crowd, share in self._crowds if waiting >= crowd), 1.0)

    def _begin_round(self) -> None:
        now = perf_counter()
        if self._began is not None and self._read:
            rest = now - self._began - self._read * PAUSE_S / self.tokens
            self._rest_s += (min(max(rest, 0.0), _LONGEST_S) - self._rest_s) / 4
        self._began, self._read = now if self._busy() else None, 0
        self._asked.clear()

    def join(self) -> Turn:
        least = min(self._waiting, key=lambda each: each.share, default=None)
        share = 0 if least is None else least.share - least.read  # before who has read something, after who has not
        turn = Turn(self, share, next(self._numbers))
        self._waiting.append(turn)
        return turn

    def measured(self, tokens: int, seconds: float) -> None:
        """So many tokens of one prompt took so long."""
        if 2 * tokens < self.tokens and seconds < PAUSE_S:
            return  # a small piece says little of a large one
        wanted = min(max(tokens * PAUSE_S / max(seconds, 1e-6), self.tokens / 2), max(tokens, self.tokens) * 2)
        self.tokens = max(self._fewest, int(wanted) // self._fewest * self._fewest)

    def _ask(self, turn: Turn, wanted: int) -> int:
        whole = self._most()
        if self._busy():
            most = max(1.0, (_LONGEST_S - self._rest_s) / PAUSE_S)
            whole = min(whole, int(self.tokens * min(self._share, most)))
        if turn.number in self._asked or not self._asked:  # who asks again has been waited for by all others
            self._begin_round()
            self._left = whole
        self._left = min(self._left, whole)
        self._asked.add(turn.number)
        mine = (turn.share, turn.number)
        before = [each for each in self._waiting if not each.blocked and each.number not in self._asked]
        in_two_parts = self._left < wanted <= whole
        if self._left <= 0 or in_two_parts or any((each.share, each.number) < mine for each in before):
            return 0
        return min(self._left, self._most())

    def _close(self, turn: Turn) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        if all(each.blocked for each in self._waiting):  # nobody is left to ask again, which would begin the next round
            self._asked.clear()
            self._began = None
