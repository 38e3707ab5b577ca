"""Prompts tokenised piece by piece, so that what a chat contained before is not tokenised again.

A fast tokenizer splits a text at its special tokens first and reads every piece alone (tokenizers, added_vocabulary.rs),
so the ids of a prompt are those of its segments one after the other. A segment begins with a special token and ends
before the next one. A tokenizer for which that is not so in a probe is used on the whole text.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

_KEPT_IDS = 1 << 19  # of all kept segments together
_PROBE = ("a", "Word and word.", " leading", "trailing ", "two\n\nlines\n", "\n", "é日", "  ")

Encode = Callable[[list[str]], list[list[int]]]  # texts to ids, in one call of the tokenizer


class Segments:
    """The ids of recent segments. May be used from any thread, if `encode` may."""

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._encode = encode
        self._kept: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._kept_ids = 0
        self._lock = threading.Lock()
        self._split = _splitting(tokenizer)
        if self._split is not None and not self._is_exact(tokenizer):
            self._split = None

    def ids(self, text: str) -> list[int]:
        """As the tokenizer would read the whole text."""
        segments = self._cut(text)
        if len(segments) < 2:
            return self._encode([text])[0]
        with self._lock:
            known = {each: found for each in segments if (found := self._kept.get(each)) is not None}
            for each in known:
                self._kept.move_to_end(each)
        new = [each for each in dict.fromkeys(segments) if each not in known]
        if new:
            known |= dict(zip(new, map(tuple, self._encode(new)), strict=True))
            self._keep({each: known[each] for each in new})
        return [id for each in segments for id in known[each]]

    def splits(self, text: str, at: int) -> bool:
        """Whether a segment begins at a character: what comes before it and after it may be tokenised separately."""
        return self._split is not None and self._split.match(text, at) is not None

    def _cut(self, text: str) -> list[str]:
        if self._split is None:
            return [text]
        starts = [0, *(found.start() for found in self._split.finditer(text) if found.start())]
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    def _keep(self, new: dict[str, tuple[int, ...]]) -> None:
        with self._lock:
            for text, ids in new.items():
                if text not in self._kept:
                    self._kept[text] = ids
                    self._kept_ids += len(ids)
            while self._kept_ids > _KEPT_IDS and self._kept:
                _text, ids = self._kept.popitem(last=False)
                self._kept_ids -= len(ids)

    def _is_exact(self, tokenizer: Any) -> bool:
        special = sorted(_boundaries(tokenizer))[:8]
        text = "".join(piece + special[at % len(special)] for at, piece in enumerate(_PROBE * 2)) + "end"
        whole, *parts = self._encode([text, *self._cut(text)])
        return whole == [id for part in parts for id in part]


def _splitting(tokenizer: Any) -> re.Pattern[str] | None:
    """What a segment begins with; None for a tokenizer that may not be given segments."""
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
        return None
    if not type(tokenizer).__module__.startswith("transformers."):  # a class of the model's own may do anything to a text
        return None
    boundaries = _boundaries(tokenizer)
    if not boundaries or any(
        each in token.content and each != token.content for each in boundaries for token in _added(tokenizer)
    ):
        return None
    return re.compile("|".join(re.escape(each) for each in sorted(boundaries, key=len, reverse=True)))


def _boundaries(tokenizer: Any) -> set[str]:
    """Special tokens that take nothing from the text before them."""
    return {
        token.content
        for token in _added(tokenizer)
        if token.special and token.content and not (token.lstrip or token.single_word or token.normalized)
    }


def _added(tokenizer: Any) -> Sequence[Any]:
    return list((getattr(tokenizer, "added_tokens_decoder", None) or {}).values())
