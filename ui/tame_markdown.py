"""Markdown that costs a browser too much: a page of a thousand nested quotes, or a line of ten thousand stars.

The time that a Markdown parser takes grows with the square of the marks in a paragraph, and its depth with the marks at the
beginning of a line. No message that somebody wants to read has so many; they are shown as the characters that they are.
"""

import re

MOST_MARKS = 1500  # of one paragraph
_MOST_DEPTH = 12  # quotes and lists within each other
_MOST_INDENT = 40  # columns
_BEGIN = r"[ \t]*(?:>|[-+*](?=[ \t])|\d{1,9}[.)](?=[ \t]))"
_DEEP = re.compile(rf"^((?:{_BEGIN}){{{_MOST_DEPTH}}})((?:{_BEGIN})+)", re.M)
_INDENTED = re.compile(rf"^[ \t]{{{_MOST_INDENT},}}", re.M)
_MARK = re.compile(r"[*_~\[\]!\\]")
_ESCAPED = re.compile(r"\\(.?)|[*_~\[\]!]", re.S)
_BLOCK = re.compile(rf"\n(?=[ \t]*\n|{_BEGIN}|[ \t]*#{{1,6}}[ \t]|[ \t]*\|)")


def is_tame(text: str) -> bool:
    """Whether `tame` would leave a text as it is; quick."""
    return len(text) <= MOST_MARKS and _DEEP.search(text) is None


def tame(text: str) -> str:
    """Markdown without blocks of code, with what would take a parser too long shown as characters."""
    text = _DEEP.sub(lambda match: match[1] + " " + _entities(match[2].strip()), _INDENTED.sub(" " * _MOST_INDENT, text))
    if len(_MARK.findall(text)) <= MOST_MARKS:
        return text
    return "\n".join(_plain(each) if len(_MARK.findall(each)) > MOST_MARKS else each for each in _BLOCK.split(text))


def _plain(paragraph: str) -> str:
    """Entities, because each backslash costs a parser as much as what it escapes."""

    def plain(match: re.Match[str]) -> str:
        if match[0][0] != "\\":
            return _entities(match[0])
        shown = match[1] or ""
        return _entities(shown) if shown and not shown.isalnum() and not shown.isspace() else _entities("\\") + shown

    return _ESCAPED.sub(plain, paragraph)


def _entities(text: str) -> str:
    return "".join(each if each.isalnum() or each.isspace() else f"&#{ord(each)};" for each in text)
