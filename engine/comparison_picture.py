"""A comparison as a picture to share: SVG, which the browser saves as PNG. Text alone, no script and nothing from elsewhere."""

import textwrap
import unicodedata
from html import escape

from ..core.errors import BadParameter
from .comparison import VOTES, Comparison, Side

_WIDTH, _MARGIN, _GAP = 1200, 40, 40
_COLUMN = (_WIDTH - 2 * _MARGIN - _GAP) // 2
_LINE, _SIZE = 24, 17  # height of a line, and of its letters
_LETTER = 0.56 * _SIZE  # a letter's width; wide ones (Chinese) take two
_MOST_LINES = 60  # of an answer
_MOST_ASKED = 12  # lines of the prompt


def picture(comparison: Comparison) -> str:
    """SVG of an ended comparison. Raises BadParameter before the vote of a blind one."""
    if not comparison.is_open or not comparison.is_done:
        raise BadParameter("The names are hidden until you vote. Press one of the buttons below the answers.")
    parts = [_text(_MARGIN, 56, "Two models, one prompt", 26, "#111", bold=True)]
    y = 100.0
    for line in _lines(comparison.prompt, _WIDTH - 2 * _MARGIN, _MOST_ASKED):
        parts.append(_text(_MARGIN, y, line, _SIZE, "#555"))
        y += _LINE
    top = y + 20
    ends = []
    for at, side in enumerate(comparison.sides):
        column, end = _side(side, at + 1, _MARGIN + at * (_COLUMN + _GAP), top)
        parts += column
        ends.append(end)
    bottom = max(ends) + 16
    said = f"Blind vote: {VOTES[comparison.vote]}." if comparison.vote else ""
    parts += [_text(_MARGIN, bottom, said, _SIZE, "#111", bold=True)] if said else []
    height = int(bottom + 30)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _side(side: Side, number: int, x: float, top: float) -> tuple[list[str], float]:
    """(one column, where it ends)."""
    parts, y = [], top
    for text, colour, bold in (
        *((line, "#111", True) for line in _lines(f"Answer {number}: {side.name}", _COLUMN, 3)),
        *((f"{name}: {value}", "#555", False) for name, value in (("Model", side.badge), *side.figures)),
    ):
        parts.append(_text(x, y, text, _SIZE, colour, bold=bold))
        y += _LINE
    y += 12
    for line in _lines(side.text.strip(), _COLUMN, _MOST_LINES):
        parts.append(_text(x, y, line, _SIZE, "#111"))
        y += _LINE
    return parts, y


def _text(x: float, y: float, text: str, size: int, colour: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{weight} xml:space="preserve">{escape(text)}</text>'


def _lines(text: str, width: float, most: int) -> list[str]:
    """A text cut to lines of about that many pixels; the last one says how many are missing."""
    letters = int(width / _LETTER)
    lines: list[str] = []
    for paragraph in "".join(each if each.isprintable() or each == "\n" else " " for each in text).split("\n"):
        wide = sum(unicodedata.east_asian_width(each) in "WF" for each in paragraph) > len(paragraph) / 4
        lines += textwrap.wrap(paragraph, letters // 2 if wide else letters, drop_whitespace=False) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], f"… {len(lines) - most + 1} rows more"]
