"""How the text of a message becomes the Markdown that a Chatbot shows: safe, with formulas, thoughts folded.

`message_markdown` is for a message that is finished. `LiveMarkdown` is for one that is being written: it does not read
again what it has read before.
"""

import functools
from html import escape

from ..core.thinking import Part, parts_of
from ..core.units import format_duration
from .safe_markdown import ends_in_code, safe_markdown

_MOST_KEPT = 8000  # characters of a message whose Markdown is kept
_TAIL = 4000  # characters of a message being written that are read anew each time


def message_markdown(text: str, *, thinking_s: float | None = None, begun: bool = False, live: bool = False) -> str:
    """A message for a Chatbot.

    `thinking_s`: how many seconds its thought took, None if that is not known. `begun`: the prompt opened a thought.
    `live`: it is being written, and a thought that has not ended stays unfolded.
    """
    if live or len(text) > _MOST_KEPT:
        return _markdown(text, thinking_s, begun, live)
    return _kept_markdown(text, thinking_s, begun)


@functools.lru_cache(maxsize=1000)
def _kept_markdown(text: str, thinking_s: float | None, begun: bool) -> str:
    """Every turn shows the same messages again, and one more."""
    return _markdown(text, thinking_s, begun, False)


def _markdown(text: str, thinking_s: float | None, begun: bool, live: bool) -> str:
    parts = parts_of(text, begun=begun)
    if not any(each.is_thought for each in parts):
        return safe_markdown(parts[0].text if len(parts) == 1 else text)
    shown = []
    for each in parts:
        shown.append(_folded(each, thinking_s, live) if each.is_thought else safe_markdown(each.text))
        thinking_s = None if each.is_thought else thinking_s  # it is the first thought's
    return "\n\n".join(shown)


class LiveMarkdown:
    """One message while it is written. Each call costs about as much as what is new in it."""

    def __init__(self) -> None:
        self._source = ""  # the beginning of the answer that is settled …
        self._shown = ""  # … as Markdown

    def update(self, text: str, thinking_s: float | None = None, *, begun: bool = False) -> str:
        """The whole message so far, as `message_markdown` makes it."""
        if not text.startswith(self._source):
            self._source = self._shown = ""
        rest = text[len(self._source) :]
        begun = begun and not self._source
        if len(rest) > 2 * _TAIL and (end := _settled(rest, begun)):
            piece = message_markdown(rest[:end], thinking_s=thinking_s, begun=begun)
            self._shown += piece.rstrip("\n") + "\n\n"
            self._source += rest[:end]
            rest, begun = rest[end:], False
        return self._shown + message_markdown(rest, thinking_s=thinking_s, begun=begun, live=True)


def _settled(text: str, begun: bool) -> int:
    """How much of the text, up to a blank line between two paragraphs, cannot change its look any more."""
    end = text.rfind("\n\n", 0, len(text) - _TAIL)
    while end > 0:
        before = text[:end]
        after = text[end + 2 : end + 3]
        parts = parts_of(before, begun=begun)
        if after and not after.isspace() and not (parts and parts[-1].is_open) and not ends_in_code(before):
            return end + 2
        end = text.rfind("\n\n", 0, end)
        if len(text) - end > 8 * _TAIL:
            return 0
    return 0


def _folded(part: Part, thinking_s: float | None, live: bool) -> str:
    if part.is_open and live:
        title, shown = "Thinking …", " open"
    else:
        title, shown = "Thought" if thinking_s is None else f"Thought for {format_duration(thinking_s)}", ""
    inside = safe_markdown(part.text, ends_blocks=True)
    return f'<details class="gw-think"{shown}><summary>{escape(title)}</summary>\n\n{inside}\n\n</details>'
