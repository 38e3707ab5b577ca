"""An answer in channels, as GPT-OSS writes it: what is thought, what is said, and calls of tools."""

import re
from dataclasses import dataclass, field

from .tool_calls import NumberedCalls, Piece
from .tool_formats import NoCall, Tools, read_channel

_TAG = re.compile(r"<\|(channel|message|start|end|call|return|constrain)\|>")


@dataclass
class ChannelCalls:
    """GPT-OSS writes <|channel|>NAME<|message|>text<|end|>: `final` is the answer, `commentary to=functions.X` a call.

    The tool may also be named before the channel, ` to=functions.X<|channel|>commentary`, at the start of an answer too.
    `analysis`, its thinking, is left out of the text; `take_thought` gives what is new of it.
    """

    tools: Tools
    _calls: NumberedCalls = field(default_factory=NumberedCalls)
    _held: str = ""
    _header: str | None = None  # of the channel; None outside
    _thought: str = ""
    _body: str | None = None  # of a message, as far as it is not passed on; None: not begun
    _start: str | None = ""  # of the answer, while it may be the name of a tool; None: it is not
    _is_plain: bool = False  # the answer has no channels so far

    @property
    def count(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        found: list[Piece] = []
        while match := _TAG.search(self._held):
            self._take(self._held[: match.start()], found)
            self._held = self._held[match.end() :]
            self._tag(match[1], found)
        cut = self._held.rfind("<")
        if cut < 0 or len(self._held) - cut > len("<|constrain|>"):
            cut = len(self._held)
        self._take(self._held[:cut], found)
        self._held = self._held[cut:]
        return found

    def end(self) -> list[Piece]:
        found: list[Piece] = []
        self._take(self._held, found)
        self._held = ""
        if self._start and self._start.strip():
            found.append(self._start)
        self._start = None
        self._close(found)
        return found

    def take_thought(self) -> str:
        """What was thought since the last call."""
        thought, self._thought = self._thought, ""
        return thought

    def _tag(self, tag: str, found: list[Piece]) -> None:
        if self._start:
            self._header, self._start = self._start, None
        self._start, self._is_plain = None, False
        if tag == "constrain":
            return
        if tag == "message":
            self._body = ""
            return
        named = self._header if tag == "channel" and self._body is None and "to=" in (self._header or "") else ""
        self._close(found)
        self._header = f"{named} " if named else "" if tag in ("channel", "start") else None

    def _take(self, text: str, found: list[Piece]) -> None:
        if self._body is None:
            if self._start is not None and self._header is None:
                self._start += text
                begun = self._start.lstrip()
                if "to=".startswith(begun[:3]):
                    return
                text, self._start, self._is_plain = self._start, None, True
            if self._header is not None:
                self._header += text
            elif self._is_plain or text.strip():
                found.append(text)
            return
        if self._is_shown():
            if text:
                found.append(text)
        elif "to=" in (self._header or ""):
            self._body += text
        else:
            self._thought += text

    def _is_shown(self) -> bool:
        header = self._header or ""
        return "to=" not in header and "analysis" not in header

    def _close(self, found: list[Piece]) -> None:
        """The end of a message."""
        body, header = self._body, self._header or ""
        self._body = None
        if body is None or self._is_shown() or "to=" not in header:
            return
        try:
            found += self._calls.pieces(read_channel(header, body, self.tools))
        except NoCall:
            found.append(body)
