"""Which entries of a lorebook apply to a conversation.

Keys are words, not patterns: a regular expression of a stranger could hold a thread of the server for ever.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from ..core.character import Lorebook, LoreEntry

_MOST_SCANNED = 20_000  # characters of the last messages
_MOST_KEYS = 20_000  # of all entries; those of later entries are not looked for
_MOST_S = 1.0  # of the processor, for one conversation; then no further keys are looked for. Real books take milliseconds
_MOST_ROUNDS = 4  # of entries that call each other
_CHARACTERS_A_TOKEN = 4  # about, where nobody counts


def applying(book: Lorebook, texts: Sequence[str], count: Callable[[str], int] | None = None) -> list[LoreEntry]:
    """The entries for a conversation, in the order in which they are inserted.

    `texts` are its messages, the last one last; `count` says how many tokens a text has, else that is estimated.
    """
    scanned = "\n".join(list(texts)[len(texts) - min(book.scan_depth, len(texts)) :])[-_MOST_SCANNED:]
    chosen: dict[int, LoreEntry] = {}
    entries = list(_first_with_keys(book.entries))
    until = time.thread_time() + _MOST_S
    for _ in range(_MOST_ROUNDS if book.recursive else 1):
        text, folded = _Text(scanned, until), _Text(scanned.casefold(), until)
        new = {
            at: each
            for at, each in enumerate(entries)
            if at not in chosen and each.enabled and each.content.strip() and _applies(each, text, folded)
        }
        if not new:
            break
        chosen |= new
        scanned = "\n".join([scanned, *(each.content for each in new.values())])[-2 * _MOST_SCANNED :]
    kept = _within(list(chosen.values()), book.token_budget, count)
    return sorted(kept, key=lambda each: each.order)


def _first_with_keys(entries: Sequence[LoreEntry]) -> Iterator[LoreEntry]:
    keys = 0
    for each in entries:
        keys += len(each.keys) + len(each.secondary_keys)
        if keys <= _MOST_KEYS:
            yield each


def _applies(entry: LoreEntry, text: "_Text", folded: "_Text") -> bool:
    if entry.constant:
        return True

    def has(key: str) -> bool:
        return text.has(key) if entry.case_sensitive else folded.has(key.casefold())

    if not any(has(key) for key in entry.keys):
        return False
    if not entry.secondary_keys:
        return True
    found = [has(key) for key in entry.secondary_keys]
    return {"any": any(found), "all": all(found), "not any": not any(found), "not all": not all(found)}[entry.logic]


class _Text:
    """A text in which words are looked for. Writing without spaces between words (Chinese, Japanese, Thai) has them anywhere."""

    def __init__(self, text: str, until: float) -> None:
        """`until`: of time.thread_time."""
        self._text, self._until = text, until
        self._found: dict[str, bool] = {}
        self._next: list[int] = []  # of each place: where the next word begins; made when it is first needed

    def has(self, key: str) -> bool:
        if key not in self._found:
            self._found[key] = bool(key) and time.thread_time() < self._until and self._search(key)
        return self._found[key]

    def _search(self, key: str) -> bool:
        text = self._text
        at = text.find(key)
        while at >= 0:
            before, after = text[at - 1 : at], text[at + len(key) : at + len(key) + 1]
            if _joins(before, key[0]):  # in the middle of a word: so is each place up to the next one
                at = text.find(key, self._next_word(at))
            elif _joins(key[-1], after):
                at = text.find(key, at + 1)
            else:
                return True
        return False

    def _next_word(self, at: int) -> int:
        if not self._next:
            text, begin = self._text, len(self._text)
            self._next = [begin] * len(text)
            for place in range(len(text) - 1, 0, -1):
                self._next[place] = begin
                if not _joins(text[place - 1], text[place]):
                    begin = place
            self._next[:1] = [begin]
        return self._next[at]


def _joins(left: str, right: str) -> bool:
    """Whether two characters are of one word."""
    return left.isalnum() and right.isalnum() and left < "\u2e80" and right < "\u2e80" and not "\u0e00" <= right < "\u0e80"


def _within(entries: list[LoreEntry], budget: int, count: Callable[[str], int] | None) -> list[LoreEntry]:
    """Those that fit: constant ones first, then by priority."""
    if not budget:
        return entries

    def rank(entry: LoreEntry) -> tuple[bool, int]:
        return entry.constant, entry.order if entry.priority is None else entry.priority

    kept, left = [], budget
    for each in sorted(entries, key=rank, reverse=True):
        tokens = count(each.content) if count is not None else len(each.content) // _CHARACTERS_A_TOKEN + 1
        if tokens <= left:
            kept.append(each)
            left -= tokens
    return kept
