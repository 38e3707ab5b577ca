"""Reads the arguments of a call as Gemma writes them."""

import json
import re
from typing import Any

from .tool_format import NoCall, next_json, no_call

_WORD = re.compile(r"[^,\]}]*")


class BraceArguments:
    """Gemma's arguments: {key:value,…} with bare keys and texts between quotes of the model's own, which nothing escapes."""

    def __init__(self, text: str, at: int, quote: str) -> None:
        self.text, self.at, self._quote = text, at, quote

    def value(self) -> Any:
        """Raises NoCall."""
        self._space()
        if self._takes(self._quote):
            return self._upto(self._quote)
        if self._takes("{"):
            return self._members()
        if self._takes("["):
            return self._items()
        if self.text.startswith('"', self.at):
            value, rest = next_json(self.text[self.at :])
            self.at = len(self.text) - len(rest)
            return value
        match = _WORD.match(self.text, self.at)
        word = match[0].strip() if match else ""
        self.at = match.end() if match else self.at
        try:
            return json.loads(word)
        except ValueError:
            plain = {"True": True, "False": False, "None": None, "none": None}
            return plain.get(word, word) if word else no_call(self.text[:80])

    def _members(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._ends("}", bool(found)):
            key = self._upto(self._quote) if self._takes(self._quote) else None
            key = key + self._upto(":").strip() if key is not None else self._upto(":").strip().strip('"')
            found[key] = self.value()
        return found

    def _items(self) -> list[Any]:
        found: list[Any] = []
        while not self._ends("]", bool(found)):
            found.append(self.value())
        return found

    def _ends(self, sign: str, begun: bool) -> bool:
        self._space()
        if self._takes(sign):
            return True
        if begun and not self._takes(","):
            raise NoCall(self.text[:80])
        self._space()
        if self.at >= len(self.text):
            raise NoCall("cut off")
        return False

    def _upto(self, mark: str) -> str:
        end = self.text.find(mark, self.at)
        if end < 0:
            raise NoCall("cut off")
        found, self.at = self.text[self.at : end], end + len(mark)
        return found

    def _takes(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.at):
            return False
        self.at += len(sign)
        return True

    def _space(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
