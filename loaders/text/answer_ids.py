"""What a model said, as the ids it said it with, so that the next prompt can begin with the same ids.

The text of an answer tokenises differently from the ids that were drawn (a model may spell a word in
pieces), so a prompt made of text alone would part from the kept conversation at the first answer.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_KEPT = 64  # answers
_LOOK_BACK = 32  # ids at the end of an answer that a stop string may have swallowed


@dataclass(frozen=True)
class _Answer:
    prompt: str
    prompt_ids: tuple[int, ...]
    text: str  # exactly what the ids say
    ids: tuple[int, ...]


class Spoken:
    """The last answers. May be used from any thread."""

    def __init__(self) -> None:
        self._answers: list[_Answer] = []
        self._lock = threading.Lock()

    def remember(
        self, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int], shown: str, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """An answer of `ids` of which the reader saw `shown`: ids that say more than that (a stop string) are left off."""
        ids = list(ids)
        wanted = shown.strip()
        for _ in range(min(len(ids), _LOOK_BACK)):
            text = decode(ids)
            if text.strip() == wanted:
                break
            ids.pop()
        else:
            return
        if not ids or not wanted:
            return
        with self._lock:
            self._answers.append(_Answer(prompt, tuple(prompt_ids), text, tuple(ids)))
            del self._answers[:-_KEPT]

    def spliced(self, prompt: str, ids: Sequence[int], starts: Sequence[int]) -> list[int] | None:
        """The ids of a prompt whose own tokens are `ids` and begin at the characters `starts`: the longest kept
        conversation it begins with, then its own from there; None if there is none, or no token begins there."""
        with self._lock:
            answers = sorted(self._answers, key=lambda each: len(each.prompt), reverse=True)
        for answer in answers:
            end = _end(prompt, answer)
            if end is None:
                continue
            if end == len(prompt):
                return [*answer.prompt_ids, *answer.ids]
            if end in starts:
                return [*answer.prompt_ids, *answer.ids, *ids[starts.index(end) :]]
        return None


def _end(prompt: str, answer: _Answer) -> int | None:
    """Where in the prompt the answer ends, None if the prompt does not begin with that prompt and answer.

    A template may have cut off white space around the answer; that is no edit.
    """
    if not prompt.startswith(answer.prompt):
        return None
    start = len(answer.prompt)
    if prompt.startswith(answer.text, start):
        return start + len(answer.text)
    bare = answer.text.strip()
    blank = len(prompt[start:]) - len(prompt[start:].lstrip())
    return start + blank + len(bare) if prompt.startswith(bare, start + blank) else None


def offsets(tokenizer: Any, text: str) -> tuple[list[int], list[int]] | None:
    """(ids of a text without special tokens of its own, the character each begins at); None from a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [start for start, _end in found["offset_mapping"]]
