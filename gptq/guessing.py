"""Guesses at the next tokens, from what the conversation already holds (prompt lookup, Saxena 2023).

Answers often repeat their prompt: code, names, quotations. The tokens that followed the same words earlier are computed
together with the last token, which costs little more than that token alone. A guess that was sampled indeed is a token
gained; a wrong one is cut off. Each token is sampled from the same logits as without guesses, so the answer is the same.
"""

from collections.abc import Sequence

MOST_GUESSES = 7
_LONGEST = 8  # tokens of a match that are told apart
_PRIOR = (0.0, 0.05, 0.2, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9)  # by length of the match, before anything is known of the conversation
_PRIOR_TOKENS = 6.0  # the prior counts as much as so many tokens
_CREDIT = 0.5  # passes that a new conversation may lose by guesses before they stop
_MOST_BALANCE = 2.0  # passes that are counted as gained or lost: a text that changes is noticed soon
_MOST_MORE = 3.0  # passes: a pass that took longer was disturbed
_MOST_DEARER = 10.0
_DOUBT = 0.005  # share of the assumed cost that comes back with each pass: one slow pass is no rule
_NEWS = 0.3  # share of a new measurement in what a pass with guesses takes
_FORGET = 0.98  # of what is known of a match length, with each token seen there


class Guesser:
    """For one conversation. Learns how often the token after a match is the right one, also where none is guessed.

    It keeps account of what guesses gain and cost. While they have cost more than they gained, guesses are only noted, and the
    account goes on with what they would have gained.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._pairs = dict(zip(zip(self._ids, self._ids[1:], strict=False), range(2, len(self._ids)), strict=False))
        self._right = [_PRIOR_TOKENS * each for each in _PRIOR]
        self._seen = [_PRIOR_TOKENS] * len(_PRIOR)
        self._at = 0  # what the last tokens match ends before this place …
        self._length = 0  # … and is so long; 0: there is no match
        self._balance = _CREDIT  # passes
        self._dearer = 1.0  # what passes with guesses took more than one without, relative to what was assumed
        self._charged = 0.0  # for the last guesses, as it was assumed
        self._open: list[int] = []  # what was guessed or noted last, without what has come since; last token first
        self._free = 0  # of those to come, how many are computed anyway
        self.speed = 1.0  # tokens for each pass's time that the last guesses promised
        self._find()

    @property
    def matches(self) -> bool:
        """Whether the last tokens stood somewhere before."""
        return self._length > 0

    def add(self, id: int) -> None:
        """The token that came next."""
        ids = self._ids
        if self._open:
            if self._open.pop() == id:
                self._balance = min(_MOST_BALANCE, self._balance + (self._free <= 0))
            else:
                self._open.clear()
            self._free -= 1
        if self._length:
            right, known = ids[self._at] == id, min(self._length, _LONGEST)
            self._right[known] = self._right[known] * _FORGET + right
            self._seen[known] = self._seen[known] * _FORGET + 1
        else:
            right = False
        if len(ids) >= 2:
            self._pairs[ids[-2], ids[-1]] = len(ids)
        ids.append(id)
        if right:
            self._at, self._length = self._at + 1, self._length + 1
        else:
            self._find()

    def guess(self, costs: Sequence[float], after: int = 0) -> list[int]:
        """The tokens that are worth computing now. costs[r]: time of a pass with r more rows, relative to one with none more.

        `after` tokens are being computed already and not known yet: what they should be comes first in the list, and the
        guesses count only if they are that.
        """
        if not self._length or (self._open and self._balance < 0):
            return []
        most, period = min(MOST_GUESSES, len(costs) - 1), len(self._ids) - self._at  # what is beyond the end begins again
        self._dearer += _DOUBT * (1 - self._dearer)
        costs = [1 + (each - 1) * self._dearer for each in costs]
        best, speed, expected, chance = 0, 1.0, 1.0, 1.0
        for count in range(1 - after, most + 1):
            known = min(self._length + after + count - 1, _LONGEST)
            chance *= self._right[known] / self._seen[known]
            if count < 1:
                continue
            expected += chance
            if expected / costs[count] > speed:
                best, speed = count, expected / costs[count]
        self.speed = speed
        found = [self._ids[self._at + at % period] for at in range(after + best)] if best else []
        pays = self._balance >= 0
        self._open = found[::-1]
        self._free = after if best else 0
        self._charged = costs[best] - 1
        self._balance = max(-_MOST_BALANCE, self._balance - self._charged)
        return found if pays else []

    def paid(self, more: float) -> None:
        """What the pass with the last guesses took more than one without them, relative to that one. Measured, so it may err."""
        if self._charged > 0:
            more = min(max(more, 0.0), _MOST_MORE)
            self._balance = max(-_MOST_BALANCE, self._balance - (more - self._charged))
            self._dearer = min(max(self._dearer * (1 + _NEWS * (more / self._charged - 1)), 1 / _MOST_DEARER), _MOST_DEARER)

    def _find(self) -> None:
        """The latest place where the last two tokens stood before, and how many tokens match there."""
        ids = self._ids
        self._length = 0
        self._at = self._pairs.get((ids[-2], ids[-1]), 0) if len(ids) >= 2 else 0
        if self._at:
            end = len(ids)
            while self._length < min(_LONGEST, self._at) and ids[self._at - 1 - self._length] == ids[end - 1 - self._length]:
                self._length += 1
