"""Earlier answers of a model as the ids it sampled, so that the next prompt can begin with the same ids.

The text of an answer tokenises differently from the ids that were sampled (a model may spell a word in pieces), so a
prompt made of text alone would differ from the cached conversation at the first answer.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_KEPT = 64  # answers
_LOOK_BACK = 32  # ids at the end of an answer that a stop string may have removed


@dataclass(frozen=True)
class _Answer:
    prompt: str
    prompt_ids: tuple[int, ...]
    text: str  # exactly what the ids decode to
    ids: tuple[int, ...]


class EarlierAnswers:
    """The last answers. May be used from any thread."""

    def __init__(self) -> None:
        self._answers: list[_Answer] = []
        self._lock = threading.Lock()

    def remember(
        self, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int], shown: str, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """Keep an answer of `ids` of which the reader saw `shown`. Ids past that (a stop string) are left off."""
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

    def beginnings(self, prompt: str) -> list[tuple[list[int], int]]:
        """(ids, the character of the prompt at which they end) of every kept prompt with its answer that it begins with.

        The longest comes first.
        """
        with self._lock:
            answers = sorted(self._answers, key=lambda each: len(each.prompt), reverse=True)
        return [([*each.prompt_ids, *each.ids], end) for each in answers if (end := _end(prompt, each)) is not None]


def _end(prompt: str, answer: _Answer) -> int | None:
    """Where in the prompt the answer ends, None if the prompt does not begin with that prompt and answer.

    A template may have cut off white space around the answer. That is no edit.
    """
    if not prompt.startswith(answer.prompt):
        return None
    start = len(answer.prompt)
    if prompt.startswith(answer.text, start):
        return start + len(answer.text)
    bare = answer.text.strip()
    blank = len(prompt[start:]) - len(prompt[start:].lstrip())
    return start + blank + len(bare) if prompt.startswith(bare, start + blank) else None
