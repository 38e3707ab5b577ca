"""Small pieces of HTML that all tabs use. All text is escaped here."""

from collections.abc import Iterable
from html import escape


def quiet(text: str) -> str:
    """A line of information; nothing for an empty text."""
    return f'<p class="gw-quiet" role="status">{escape(text)}</p>' if text else ""


def good(text: str) -> str:
    return f'<p class="gw-good" role="status">{escape(text)}</p>'


def bad(text: str) -> str:
    """An error."""
    return f'<p class="gw-bad" role="alert">{escape(text)}</p>'


def link(address: str, text: str) -> str:
    """A link to another site that opens in a new tab. Anything but a web address becomes plain text."""
    if not address.startswith(("https://", "http://")):
        return quiet(text)
    return f'<p><a class="gw-link" href="{escape(address)}" target="_blank" rel="noopener noreferrer">{escape(text)}</a></p>'


def working(text: str, share: float | None, *details: str) -> str:
    """A line with a bar under it, and quiet lines below. `share` is the part that is done, 0..1; None if unknown."""
    percent = None if share is None else max(0, min(100, round(share * 100)))
    width = "" if percent is None else f' aria-valuenow="{percent}"'
    style = ' class="gw-some"' if percent is None else f' style="width:{percent}%"'
    under = "".join(f'<p class="gw-quiet">{escape(detail)}</p>' for detail in details if detail)
    return (
        f'<div class="gw-working"><p role="status">{escape(text)}</p>'
        f'<div class="gw-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100"{width}><i{style}></i></div>{under}</div>'
    )


def notes(texts: Iterable[str]) -> str:
    """Warnings, one a line."""
    return "".join(f'<p class="gw-note">{escape(text)}</p>' for text in texts)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, two columns."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows if value)
    return f'<dl class="gw-facts">{lines}</dl>'


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts. If it is wider than the page, it scrolls."""
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return scrolling(head, body)


def scrolling(head: str, body: str) -> str:
    """A table of rows that are already HTML."""
    return f'<div class="gw-scroll"><table class="gw-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
