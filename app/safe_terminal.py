"""What a command prints: text of models and folders, in which no control character reaches the terminal.

A name of a folder or an answer of a model may hold escape sequences that clear the screen, move the cursor or rename the
window. While a command runs, stdout and stderr show them as text ('\\x1b[2J'). Bars and status lines, which must move the
cursor, write to `raw`, and escape the text in them with `printable`.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def safe_text(text: str) -> str:
    """Several lines of text with every control character escaped, but for new lines and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))


class SafeStream:
    """A text stream that escapes what is written to it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.raw_stream = stream

    def write(self, text: str) -> int:
        self.raw_stream.write(safe_text(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_stream, name)


def raw(stream: Any) -> TextIO:
    """The stream below, for escape sequences of our own."""
    found: TextIO = getattr(stream, "raw_stream", stream)
    return found


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """stdout and stderr escape control characters in the meantime, and can write every letter."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # a pipe on Windows has no encoding for an emoji
            stream.reconfigure(encoding="utf-8", errors="replace")
    streams: Any = [SafeStream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
