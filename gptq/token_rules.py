"""What an answer's parameters mean in a model's ids: which tokens end it, which may not come, where a text is banned.

Whoever makes one knows the tokenizer (loaders/text/answer_rules.py); here are only ids, and one interface for texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class BannedTexts(Protocol):
    """Where a text that must not occur begins in an answer."""

    def begins(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """(number of the token of an answer in which a banned text that it contains begins, or None; how many of the first
        tokens can no longer become part of one)."""


@dataclass(frozen=True)
class TokenRules:
    ends: frozenset[int] = frozenset()  # any of these ends the answer
    banned: frozenset[int] = frozenset()  # never sampled
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last id of each may not follow the others
    breakers: frozenset[int] = frozenset()  # a repetition does not reach over these (DRY)
    texts: BannedTexts | None = None


NO_RULES = TokenRules()
