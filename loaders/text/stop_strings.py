"""Ends an answer before the first stop string, even when that arrives in pieces.

Text whose end could still grow into a stop string is held back; everything else passes at once.
"""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(each for each in stop if each)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the answer

    def feed(self, text: str) -> str:
        """The text that is certain now. After a stop string was found there is none."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at, -len(each), each) for each in self._stop if (at := self._held.find(each)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            certain, self._held = self._held[:at], ""
            return certain
        keep = max((_overlap(self._held, each) for each in self._stop), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def end(self) -> str:
        """What was held back when the answer ends for another reason."""
        left, self._held = self._held, ""
        return left


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
