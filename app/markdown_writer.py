"""An answer on the terminal while it streams: Markdown with rich, or the text as it comes.

What is above the block that is being written (a paragraph, a list, a table, code) no longer changes and is printed for
good. Only that block is rendered again, and of one that is higher than the terminal only the end: the cost of a new
token does not grow with the answer.
"""

import itertools
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from .safe_terminal import raw, safe_text

if TYPE_CHECKING:
    from rich.console import Console, RenderResult
    from rich.segment import Segment

_REFRESH_S = 0.08
_IDLE_SHARE = 4  # rendering may take a fifth of the time
_MOST_CODE_LINES = 200  # of a block that is still being written
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Writer(Protocol):
    def add(self, text: str) -> None: ...

    def end(self) -> None: ...


class PlainWriter:
    """The text as it comes, to stdout."""

    def add(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)


class MarkdownWriter:
    """Markdown, to stdout, which must be a terminal. Raises ImportError without rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=raw(sys.stdout), highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._open = ""  # the text of the block that is being written
        self._gap = False  # an empty line comes before the next block
        self._next_s = 0.0
        self._live.start()

    def add(self, text: str) -> None:
        self._open += text
        began = time.monotonic()
        if began < self._next_s:
            return
        self._settle()
        if self._open.strip():
            self._live.update(_Tail(self._console, self._open, self._gap), refresh=True)
        ended = time.monotonic()
        self._next_s = ended + max(_REFRESH_S, _IDLE_SHARE * (ended - began))

    def end(self) -> None:
        self._live.stop()
        self._print(self._open)
        self._open = ""

    def _settle(self) -> None:
        """Print the blocks before the last one."""
        starts = [each.map[0] for each in parser().parse(self._open) if each.level == 0 and each.map and each.nesting >= 0]
        if len(starts) > 1:
            lines = self._open.split("\n")
            for start, end in itertools.pairwise(starts):
                self._print("\n".join(lines[start:end]))
            self._open = "\n".join(lines[starts[-1] :])
        fence = _FENCE.match(self._open)
        if fence is not None and self._open.count("\n") > 2 * _MOST_CODE_LINES:
            opening, *lines = self._open.split("\n")
            self._print("\n".join([opening, *lines[:_MOST_CODE_LINES], fence[1]]))
            self._open = "\n".join([opening, *lines[_MOST_CODE_LINES:]])
            self._gap = False

    def _print(self, text: str) -> None:
        if text.strip():
            if self._gap:
                self._console.print()
            self._console.print(_markdown(text))
            self._gap = True


class _Tail:
    """The end of a block, as much as the terminal shows."""

    def __init__(self, console: "Console", text: str, gap: bool) -> None:
        lines = console.render_lines(_markdown(text), pad=False)
        self._lines: list[list[Segment]] = [*([[]] if gap else []), *lines][-max(1, console.height - 2) :]

    def __rich_console__(self, *_: Any) -> "RenderResult":
        from rich.segment import Segment

        for at, line in enumerate(self._lines):
            yield from line
            if at + 1 < len(self._lines):
                yield Segment.line()


def parser() -> Any:
    """Markdown in which HTML is text, and backslashes stay: formulas have more of them than escapes."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("escape")


def _markdown(text: str) -> Any:
    """Links show their address: a text that hides another address is an old trick."""
    from rich.markdown import CodeBlock, Markdown
    from rich.syntax import Syntax

    class Code(CodeBlock):
        """Without empty lines around it: those of a long block come in pieces."""

        def __rich_console__(self, *_: Any) -> "RenderResult":
            code = str(self.text).removesuffix("\n")
            yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))

    shown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    shown.elements = {**Markdown.elements, "fence": Code, "code_block": Code}  # type: ignore[misc]
    shown.parsed = parser().parse(safe_text(text))
    _clean(shown.parsed)
    return shown


def _clean(tokens: list[Any]) -> None:
    """An entity may be a control character; a line of an answer stays a line."""
    for each in tokens:
        each.content = safe_text(each.content)
        if each.type == "softbreak":
            each.type = "hardbreak"
        _clean(each.children or [])


def writer(plain: bool) -> Writer:
    """Markdown on a terminal that can show it, else plain text."""
    if not plain and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            return MarkdownWriter()
        except ImportError:
            pass
    return PlainWriter()
