"""Makes the Markdown of a message safe to show: it keeps its look, runs nothing and fetches nothing.

Messages come from models and from strangers. Three things in them would make the browser act before anybody has
clicked: HTML tags, images, and whatever hides in a place that only looks like code. So code is only what every
Markdown parser takes for code, and everything else is escaped.

Formulas are put between four private characters, which are the only delimiters that the page knows: Gradio looks for
delimiters in the whole text, code included, and 4.37 lets Markdown change what is between them.
"""

import re

from .tame_markdown import MOST_MARKS, is_tame, tame

# (left, right, whether it stands on lines of its own), for a Chatbot's `latex_delimiters`
DELIMITERS = (("\ue7f2", "\ue7f3", True), ("\ue7f0", "\ue7f1", False))
_CODE = "\ue7f4"  # stands for a piece of code while formulas are looked for
_PRIVATE = str.maketrans("", "", "\ue7f0\ue7f1\ue7f2\ue7f3\ue7f4")
_FENCE = re.compile(r"(?P<indent> {0,3})(?:(?P<marks>`{3,})(?P<info>[^`]*)$|(?P<tildes>~{3,})(?P<words>.*)$)")
_PERHAPS_FENCE = re.compile(r"^( {0,3})(`{3})")
_DIAGRAM = "mermaid"  # the language of a block that Gradio 6 draws, with the HTML that is in its words
_KINDS = "interface|abstract|service|enumeration|enum|entity|exception|record|struct|trait|protocol|fork|join|choice"
# What a diagram itself means by < is kept: kinds of things, line ends, arrows, "less than". It removes some words and reads
# entities and \x3c before it shows the others, so no other < may stay, no & within a word and no such backslash.
_DIAGRAM_TAG = re.compile(rf"<<(?:{_KINDS})>>|<br ?/?>|<(?![ \t<|=.*-])|&(?![ \t])|\\(?=[xuU])", re.IGNORECASE)
_AS_WORDS = {"<": "#lt;", "&": "#amp;", "\\": "#92;"}
_DEEP_FENCE = re.compile(r"[\s>*+\-\d.)\[\]xX]*(?:`{3,}|~{3,})")  # in a quote or a list
_MERMAID = re.compile(_DIAGRAM, re.IGNORECASE)
_BACKTICKS = re.compile(r"`+")
_IMAGE = re.compile(r"!\[([^\[\]\n]*)\]\((?=[^\s()])")
_ACTIVE = re.compile(r"<|!\[|\$|\\[(\[]|(?i:mermaid)")  # a text without these is shown as it is
_OPENING = re.compile(r"\$\$|\$|\\\(|\\\[|\\[\s\S]")
_CLOSING = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_MOST_FORMULA = {"$": 400, "$$": 8000, r"\(": 8000, r"\[": 8000}  # characters
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def safe_markdown(text: str, *, ends_blocks: bool = False) -> str:
    """The same Markdown with tags shown as text, images as links, and formulas between `DELIMITERS`.

    `ends_blocks`: a block of code that is still open at the end is closed.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_PRIVATE)
    if _ACTIVE.search(text) is None and not ends_blocks and is_tame(text):
        return text
    lines = text.split("\n")
    chunks: list[str] = []
    at = begun = 0
    while at < len(lines):
        if (fence := _FENCE.match(lines[at])) is None:
            at += 1
            continue
        if begun < at:
            chunks.append(_safe_text("\n".join(lines[begun:at])))
        block, at, is_closed = _block(lines, at, fence)
        chunks += block
        if not is_closed and ends_blocks:
            chunks.append(fence["marks"] or fence["tildes"])
        begun = at
    if begun < len(lines):
        chunks.append(_safe_text("\n".join(lines[begun:])))
    return "\n".join(chunks)


def ends_in_code(text: str) -> bool:
    """Whether a text ends inside of a fenced block of code."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    at, is_closed = 0, True
    while at < len(lines):
        if (fence := _FENCE.match(lines[at])) is None:
            at += 1
            continue
        _lines, at, is_closed = _block(lines, at, fence)
    return not is_closed


def _block(lines: list[str], at: int, fence: re.Match[str]) -> tuple[list[str], int, bool]:
    """(the lines of a block of code, the first line after it, whether it is closed), written so that every parser takes
    the same lines for code.

    An indented block may belong to a list item, which a line with less indentation would end, and the code with it: such a
    block loses the indentation of its fence, and with it the item.
    """
    indent, marks, info = fence["indent"], fence["marks"] or fence["tildes"], fence["info"] or fence["words"] or ""
    end, is_closed, is_flat = len(lines), False, False
    for here in range(at + 1, len(lines)):
        rest = lines[here].strip(" \t")
        if rest.startswith(marks) and not rest.strip("`~"):
            end, is_closed = here, True
            break
        is_flat = is_flat or bool(rest and not lines[here].startswith(indent))
    indent = "" if is_flat else indent
    if _DIAGRAM in info.lower():
        lines = lines[: at + 1] + [_DIAGRAM_TAG.sub(_as_words, each) for each in lines[at + 1 : end]] + lines[end:]
    block = [indent + marks + (info if marks[0] == "`" else info.replace("`", "").replace("~", "")), *lines[at + 1 : end]]
    return ([*block, indent + marks], end + 1, True) if is_closed else (block, end, False)


def _as_words(found: re.Match[str]) -> str:
    """A tag in a diagram as words, in the diagrams' own spelling: the page's buttons could be in it."""
    return _AS_WORDS.get(found[0], found[0])


def _without_deep_diagram(line: str) -> str:
    """The beginning of a diagram in a quote or a list, as that of a piece of code: it is not drawn."""
    if (fence := _DEEP_FENCE.match(line)) is None:
        return line
    return line[: fence.end()] + _MERMAID.sub("diagram", line[fence.end() :])


def _safe_text(text: str) -> str:
    """Text without blocks of code: pieces of code, formulas and the rest."""
    codes: list[str] = []
    if "`" in text:
        text = "\n".join(_take_code(line, codes) if "`" in line else line for line in text.split("\n"))
    pieces: list[str] = []
    shown = at = 0
    ends: dict[str, int] = {}  # of each closing mark, the next one
    while (opening := _OPENING.search(text, at)) is not None:
        at = opening.end()
        end = _formula_end(text, opening, ends)
        if end is None:
            continue
        formula = text[opening.end() : end]
        left, right, _own_line = DELIMITERS[0 if opening[0] in ("$$", r"\[") else 1]
        pieces += [_escape(text[shown : opening.start()]), left, _as_entities(" ".join(formula.split())), right]
        shown = at = end + len(opening[0])
    pieces.append(_escape(text[shown:]))
    shown_text = tame("".join(pieces))
    if len(codes) > MOST_MARKS and max(each.count(_CODE) for each in _BLANK_LINE.split(shown_text)) > MOST_MARKS:
        codes = [each.replace("<code>", "&#96;").replace("</code>", "&#96;") for each in codes]  # tags are dear, too
    if _DIAGRAM in shown_text.lower():
        shown_text = "\n".join(map(_without_deep_diagram, shown_text.split("\n")))
    parts = shown_text.split(_CODE)
    return parts[0] + "".join(code + part for code, part in zip(codes, parts[1:], strict=True))


def _formula_end(text: str, opening: re.Match[str], ends: dict[str, int]) -> int | None:
    """Where the mark that closes a formula begins; None if no formula begins here.

    `$` stands for money too. As pandoc does, it opens a formula only before, and closes one only after, something that is
    no white space, on the same line, and neither stands inside of a word.
    """
    mark, begin = opening[0], opening.end()
    if (closing := _CLOSING.get(mark)) is None:
        return None
    if mark == "$" and (text[begin : begin + 1].isspace() or text[opening.start() - 1 : opening.start()].isalnum()):
        return None
    at = begin
    for _ in range(5 if mark == "$" else 1):
        end = ends.get(closing, -1)
        if mark == "$" or end < at:
            found = text.find(closing, at)
            end = ends[closing] = found if found >= 0 else len(text)
        if end - begin > _MOST_FORMULA[mark] or end == len(text):
            return None
        if mark != "$" or not (text[end - 1].isspace() or text[end - 1] == "\\" or text[end + 1 : end + 2].isalnum()):
            break
        at = end + 1
    else:
        return None
    formula = text[begin:end]
    if not formula.strip() or _CODE in formula or _BLANK_LINE.search(formula) or (mark == "$" and "\n" in formula):
        return None
    return end


def _take_code(line: str, codes: list[str]) -> str:
    """The line with a mark in the place of each `code`, which becomes a tag around escaped text: whoever reads it, nothing
    in it is Markdown or HTML."""
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
        pieces += [line[begun:start], _CODE]
        codes.append(f"<code>{_as_entities(code.strip(' ') or code)}</code>")
        begun, at = runs[end][1], end + 1
    shown = "".join([*pieces, line[begun:]])
    return _PERHAPS_FENCE.sub(r"\1\\\2", shown)  # without the backticks that made it no fence


def _escape(text: str) -> str:
    return _IMAGE.sub(r"[Image: \1](", text).replace("![", r"!\[").replace("<", "&lt;")


def _as_entities(text: str) -> str:
    """For a place where Markdown would still be seen."""
    return "".join(each if each.isalnum() or each == " " else f"&#{ord(each)};" for each in text)
