"""Whether a mark in the text of a call belongs to an argument: a file that is written may contain `</tool_call>`.

Each function gets the text before the mark, from the beginning of the call.
"""

from collections.abc import Callable


def _in_string(text: str) -> bool:
    """Whether a JSON text ends inside of a string, so that a mark there is a part of an argument."""
    inside = escaped = False
    for letter in text:
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = inside
        elif letter == '"':
            inside = not inside
    return inside


def json_open(text: str) -> bool:
    """For arguments in JSON."""
    at = text.find("{")
    return at >= 0 and _in_string(text[at:])


def python_open(text: str) -> bool:
    """For arguments in Python, which has two kinds of quotes."""
    quote = ""
    escaped = False
    for letter in text:
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = bool(quote)
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
    return bool(quote)


def tags_open(opening: str, closing: str) -> Callable[[str], bool]:
    """For arguments between tags of their own; the same models fall back to JSON."""

    def is_open(text: str) -> bool:
        if (at := text.rfind(opening)) < 0:
            return json_open(text)
        return text.find(closing, at) < 0

    return is_open


def list_open(text: str) -> bool:
    """For a list of calls that is Python or JSON."""
    return json_open(text) if text.partition("[")[2].lstrip().startswith("{") else python_open(text)


def quote_open(quote: str) -> Callable[[str], bool]:
    """For texts between two of the same mark."""
    return lambda text: text.count(quote) % 2 == 1
