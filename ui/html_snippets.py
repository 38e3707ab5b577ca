"""Small pieces of HTML that all tabs use. All text is escaped here."""

from collections.abc import Iterable, Mapping
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


def action(label: str, script: str) -> str:
    """A button within a text. `script` is JavaScript of ours, never a text from elsewhere."""
    return f'<p><button type="button" class="gw-action" onclick="{escape(script)}">{escape(label)}</button></p>'


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


def field_problems(problems: Mapping[str, str]) -> str:
    """Sentences about wrong values, by the id of the field, and the style that marks each field with its sentence."""
    rules = "".join(
        f".gradio-container #{id}{{outline:2px solid var(--gw-bad);outline-offset:-1px;border-radius:8px}}"
        f".gradio-container #{id}::after{{content:{_css_text(text)};display:block;color:var(--gw-bad);padding:2px 8px 8px}}"
        for id, text in problems.items()
    )
    lines = "".join(f'<p class="gw-bad" role="alert" data-field="{id}">{escape(text)}</p>' for id, text in problems.items())
    return f"{lines}<style>{rules}</style>" if problems else ""


def _css_text(text: str) -> str:
    return '"' + "".join(each if each.isalnum() or each in " .,-" else f"\\{ord(each):x} " for each in text) + '"'


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
    table = f'<table class="gw-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="gw-scroll" tabindex="0" role="region" aria-label="Table">{table}</div>'
