"""Finds texts that must not occur in the ids of an answer: a gptq.token_rules.BannedTexts. Case does not matter."""

from collections.abc import Sequence
from typing import Any

from .detokenize import Detokenizer

_WINDOW_TOKENS = 8  # of the prompt: what a first token's text depends on


class BannedTextFinder:
    def __init__(self, tokenizer: Any, prompt: Sequence[int], texts: Sequence[str]) -> None:
        self._tokenizer, self._prompt = tokenizer, list(prompt[-_WINDOW_TOKENS:])
        self._texts = [each.lower() for each in texts]
        self._ids: list[int] = []
        self._pieces: list[str] = []  # the text that became certain with each token
        self._certain = 0  # so many tokens cannot become part of a banned text
        self._detokenizer = Detokenizer(tokenizer, self._prompt)

    def begins(self, ids: Sequence[int]) -> tuple[int | None, int]:
        self._read(ids)
        pieces = self._pieces[self._certain :]
        window = "".join(pieces)
        hits = [at for each in self._texts if (at := window.find(each)) >= 0]
        if hits:
            return self._certain + _token_at(pieces, min(hits)), self._certain
        cut = len(window) - max((_overlap(window, each) for each in self._texts), default=0)
        certain = _token_at(pieces, cut) if cut < len(window) else len(pieces)
        while certain and not pieces[certain - 1]:  # part of a character that is not complete
            certain -= 1
        self._certain += certain
        return None, self._certain

    def _read(self, ids: Sequence[int]) -> None:
        same = 0
        while same < min(len(ids), len(self._ids)) and ids[same] == self._ids[same]:
            same += 1
        if same < len(self._ids):  # the answer went back
            del self._pieces[same:]
            self._certain = min(self._certain, same)
            self._detokenizer = Detokenizer(self._tokenizer, [*self._prompt, *ids[:same]])
        self._pieces += [self._detokenizer.feed(each).lower() for each in ids[same:]]
        self._ids = list(ids)


def _token_at(pieces: Sequence[str], at: int) -> int:
    """The number of the token that the character `at` is of."""
    end = 0
    for number, piece in enumerate(pieces):
        end += len(piece)
        if end > at:
            return number
    return len(pieces)


def _overlap(text: str, banned: str) -> int:
    """Length of the longest end of `text` that begins `banned`."""
    return next((length for length in range(min(len(text), len(banned) - 1), 0, -1) if text.endswith(banned[:length])), 0)
