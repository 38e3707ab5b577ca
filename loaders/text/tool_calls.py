"""An answer while it streams: what is text of it, and what are calls of tools.

Readers with one interface: of calls between marks (`MarkedCalls`), of an answer that a grammar holds to the JSON of calls
(`ForcedCalls`), of calls after a thought (`CallsAfterThoughts`), and of an answer in channels (channel_calls.py). A call of
a model that is free to write anything is passed on when it is complete and read; until then nothing says that it is one.
What cannot be read becomes text again.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...core.thinking import ThoughtReader
from ...core.tools import CallPart, Tool, ToolCall, new_call_id
from .tool_formats import NoCall, ToolFormat, Tools

Piece = str | CallPart
_PIECE = 256  # characters of arguments in one piece


class CallReader(Protocol):
    @property
    def count(self) -> int:
        """Calls so far."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain with this text."""

    def end(self) -> list[Piece]:
        """What is left when the answer ends."""

    def take_thought(self) -> str:
        """What was thought since the last call of this; "" from a reader that does not tell thoughts apart."""


@dataclass
class NumberedCalls:
    """Numbers the calls of an answer and gives them as pieces."""

    count: int = 0

    def pieces(self, calls: Sequence[ToolCall]) -> list[Piece]:
        found: list[Piece] = []
        for call in calls:
            found.append(CallPart(self.count, call.id, call.name))
            for at in range(0, len(call.arguments), _PIECE):
                found.append(CallPart(self.count, arguments=call.arguments[at : at + _PIECE]))
            self.count += 1
        return found


@dataclass
class _Text:
    """Text before and between calls: white space that ends it waits, since a call may follow."""

    space: str = ""
    after_call: bool = False
    begun: bool = False

    def pieces(self, text: str) -> list[Piece]:
        text = self.space + text
        if self.after_call:
            text = text.lstrip()
        bare = text.rstrip()
        self.space = text[len(bare) :]
        if not bare:
            return []
        self.after_call, self.begun = False, True
        return [bare]

    def call(self) -> None:
        self.space, self.after_call = "", True

    def end(self) -> list[Piece]:
        left, self.space = self.space, ""
        return [left] if left and not self.after_call else []


class MarkedCalls:
    """`begun`: the beginning of a call that the prompt already has."""

    def __init__(self, format: ToolFormat, tools: Sequence[Tool], parallel: bool = True, begun: str = "") -> None:
        self._format, self._parallel = format, parallel
        self._tools: Tools = {each.name: each for each in tools}
        self._leads = format.leads(tuple(self._tools))
        self._calls, self._text = NumberedCalls(), _Text()
        self._held = begun
        self._hidden = len(begun)  # characters that are no part of the answer
        self._closing: str | None = "" if begun else None  # of the call that is being read; "": the end; None: text
        self._looked = 0  # how far that call was searched for its end

    @property
    def count(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        found: list[Piece] = []
        while self._step(found):
            pass
        return found

    def end(self) -> list[Piece]:
        found: list[Piece] = []
        if self._closing is not None:
            self._read(self._held, found)
        else:
            found += self._text.pieces(self._held)
        self._held = ""
        return found + self._text.end()

    def take_thought(self) -> str:
        return ""

    def _step(self, found: list[Piece]) -> bool:
        """Read on by one text or one call. Returns whether there may be more."""
        if self._closing is not None:
            end = self._end_of_call(self._closing) if self._closing else -1
            if end < 0:
                return False
            region, self._held = self._held[:end], self._held[end:]
            self._closing, self._looked = None, 0
            self._read(region, found)
            return True
        if not self._text.begun and not self.count and self._leads:
            start = self._held.lstrip()
            if any(start.startswith(each) for each in self._leads):
                self._closing = ""
                return False
            if any(each.startswith(start) for each in self._leads):
                return False
        hits = [(at, -len(mark), mark) for mark in self._format.marks if (at := self._held.find(mark)) >= 0]
        if hits:
            at, _, mark = min(hits)
            found += self._text.pieces(self._held[:at])
            self._held, self._closing = self._held[at:], self._format.marks[mark]
            return True
        keep = max((_overlap(self._held, mark) for mark in self._format.marks), default=0)
        cut = len(self._held) - keep
        found += self._text.pieces(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _end_of_call(self, closing: str) -> int:
        """Where the call that is being read ends; -1: not yet. A mark inside of an argument does not end it."""
        while (at := self._held.find(closing, max(1, self._looked))) >= 0:
            if not self._format.is_open(self._held[:at]):
                return at + len(closing)
            self._looked = at + len(closing)
        return -1

    def _read(self, region: str, found: list[Piece]) -> None:
        hidden, self._hidden = self._hidden, 0
        try:
            calls = self._format.read(region, self._tools)
        except NoCall:
            found += self._text.pieces(region[hidden:])
            return
        if not self._parallel:
            calls = calls[: max(0, 1 - self.count)]
        self._text.call()
        found += self._calls.pieces(calls)


class ForcedCalls:
    """The JSON of one call, or of a list of calls, as a grammar makes it: the name, then the arguments as they come."""

    _HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\Z')

    def __init__(self) -> None:
        self.count = 0
        self._head = ""  # of the call whose arguments have not begun
        self._depth = 0  # of braces and brackets inside the arguments; 0: outside
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Piece]:
        found: list[Piece] = []
        start = 0
        for at, character in enumerate(text):
            if self._depth:
                if self._inside(character):
                    found.append(CallPart(self.count - 1, arguments=text[start : at + 1]))
                continue
            if character == "{" and (match := self._HEAD.search(self._head)):
                found.append(CallPart(self.count, new_call_id(), json.loads(match[1])))
                self.count += 1
                self._head, self._depth, start = "", 1, at
            else:
                self._head += character
        if self._depth and start < len(text):
            found.append(CallPart(self.count - 1, arguments=text[start:]))
        return found

    def end(self) -> list[Piece]:
        return []

    def take_thought(self) -> str:
        return ""

    def _inside(self, character: str) -> bool:
        """One character of the arguments. Returns whether they end with it."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
            return False
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0


class CallsAfterThoughts:
    """Another reader for what follows the thought that begins the answer: a call that is only thought about is none."""

    def __init__(self, calls: CallReader, prompt: str) -> None:
        self._calls, self._thoughts = calls, ThoughtReader(prompt)
        self._thought = ""

    @property
    def count(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Piece]:
        said, thought = self._thoughts.feed(text)
        self._thought += thought
        return self._calls.feed(said) if said else []

    def end(self) -> list[Piece]:
        said, thought = self._thoughts.end()
        self._thought += thought
        return [*(self._calls.feed(said) if said else []), *self._calls.end()]

    def take_thought(self) -> str:
        thought, self._thought = self._thought, ""
        return thought


MakeReader = Callable[[], CallReader]


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
