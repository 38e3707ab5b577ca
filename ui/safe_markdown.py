"""Makes the Markdown of a message safe to show: it keeps its look, runs nothing and fetches nothing.

Messages come from models and from strangers. Three things in them would make the browser act before anybody has
clicked: HTML tags, images, and whatever hides in a place that only looks like code. So code is only what every
Markdown parser takes for code, and everything else is escaped.
"""

import re

_FENCE = re.compile(r"( {0,3})(`{3,})[^`]*$|( {0,3})(~{3,})[^`~]*$")
_BACKTICKS = re.compile(r"`+")
_MOST_LINES = 400  # of an indented block of code; a longer one is escaped
_IMAGE = re.compile(r"!\[([^\[\]\n]*)\]\((?=[^\s()])")
_MATH = re.compile(r"(\$\$[\s\S]+?\$\$)")  # Gradio takes these out of the text before it looks for code


def safe_markdown(text: str) -> str:
    """The same Markdown with tags shown as text and images as links."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "<" not in text and "![" not in text:
        return text
    if any("```" in each or "~~~" in each for each in _MATH.findall(text)):
        return _escape(text)  # where code begins and ends depends on who reads it
    lines = text.split("\n")
    chunks: list[str] = []
    at = begun = 0
    while at < len(lines):
        end, is_code = _next_code(lines, at)
        if is_code:
            if begun < at:
                chunks.append(_safe_text("\n".join(lines[begun:at])))
            chunks.append("\n".join(lines[at:end]))
            begun = end
        at = end
    if begun < len(lines):
        chunks.append(_safe_text("\n".join(lines[begun:])))
    return "\n".join(chunks)


def _next_code(lines: list[str], at: int) -> tuple[int, bool]:
    """(the first line after, whether the lines before it are a fenced block of code for sure), from a line on.

    An indented block may belong to a list item, which a line with less indentation would end, and the code with it.
    """
    if (fence := _FENCE.match(lines[at])) is None:
        return at + 1, False
    indent, marks = fence[1] or fence[3] or "", fence[2] or fence[4]
    for here in range(at + 1, len(lines)):
        line = lines[here]
        if indent and (here - at > _MOST_LINES or (line.strip() and not line.startswith(indent))):
            return here, False
        rest = line.strip(" \t")
        if rest.startswith(marks) and not rest.strip("`~ \t"):
            return here + 1, True
    return len(lines), True  # still being written


def _safe_text(text: str) -> str:
    """Text without code blocks, made of formulas and the rest."""
    parts = _MATH.split(text)
    return "".join(_safe_math(part) if at % 2 else _safe_prose(part) for at, part in enumerate(parts))


def _safe_math(text: str) -> str:
    return text.replace("<", r"\lt ").replace("![", "! [")


def _safe_prose(text: str) -> str:
    return "\n".join(_safe_line(line) if "`" in line else _escape(line) for line in text.split("\n"))


def _safe_line(line: str) -> str:
    """`code` becomes a tag around escaped text: whoever reads it, nothing in it is Markdown or HTML."""
    runs = [(each.start(), each.end()) for each in _BACKTICKS.finditer(line)]
    closing: list[int | None] = [None] * len(runs)  # for each run of backticks, the next one of the same length
    last: dict[int, int] = {}
    for at in range(len(runs) - 1, -1, -1):
        length = runs[at][1] - runs[at][0]
        closing[at] = last.get(length)
        last[length] = at
    pieces: list[str] = []
    begun = at = 0
    while at < len(runs):
        end, (start, inside) = closing[at], runs[at]
        if end is None or line[start - 1 : start] == "\\":
            at += 1
            continue
        code = line[inside : runs[end][0]]
        pieces += [_escape(line[begun:start]), f"<code>{_as_entities(code.strip(' ') or code)}</code>"]
        begun, at = runs[end][1], end + 1
    return "".join([*pieces, _escape(line[begun:])])


def _escape(text: str) -> str:
    return _IMAGE.sub(r"[Image: \1](", text).replace("![", r"!\[").replace("<", "&lt;")


def _as_entities(text: str) -> str:
    """For the inside of an HTML tag, where Markdown would still be seen."""
    return "".join(each if each.isalnum() or each == " " else f"&#{ord(each)};" for each in text)
