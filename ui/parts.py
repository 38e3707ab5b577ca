"""Small pieces of HTML that every tab shows. All text in them is escaped here."""

from collections.abc import Iterable
from html import escape


def quiet(text: str) -> str:
    """One line that informs without asking for attention; empty text draws nothing."""
    return f'<p class="gw-quiet" role="status">{escape(text)}</p>' if text else ""


def good(text: str) -> str:
    return f'<p class="gw-good" role="status">{escape(text)}</p>'


def bad(text: str) -> str:
    """An error, in words."""
    return f'<p class="gw-bad" role="alert">{escape(text)}</p>'


def working(text: str, share: float | None, detail: str = "") -> str:
    """A line with a bar under it. `share` is done of 1; None if nobody can say."""
    percent = None if share is None else max(0, min(100, round(share * 100)))
    width = "" if percent is None else f' aria-valuenow="{percent}"'
    style = ' class="gw-some"' if percent is None else f' style="width:{percent}%"'
    under = f'<p class="gw-quiet">{escape(detail)}</p>' if detail else ""
    return (
        f'<div class="gw-working"><p role="status">{escape(text)}</p>'
        f'<div class="gw-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100"{width}><i{style}></i></div>{under}</div>'
    )


def notes(texts: Iterable[str]) -> str:
    """Gentle warnings, one a line."""
    return "".join(f'<p class="gw-note">{escape(text)}</p>' for text in texts)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, two columns."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows if value)
    return f'<dl class="gw-facts">{lines}</dl>'
