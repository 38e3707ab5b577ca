"""ui/safe_markdown.py: nothing in a message runs or is fetched, and code looks like code."""

import html
import random
import re
import time

import pytest

from gptq_webui.ui.safe_markdown import safe_markdown

IN, OUT, SHOW, WELL = "\ue7f0", "\ue7f1", "\ue7f2", "\ue7f3"
OUTSIDE = "http://outside.invalid/x.png"


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("plain *text*", "plain *text*"),
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("`<b>` and <b>", "<code>&#60;b&#62;</code> and &lt;b>"),
        ("``a ` <b>`` <b>", "<code>a &#96; &#60;b&#62;</code> &lt;b>"),
        ("```c\n#include <stdio.h>\n```\n<i>", "```c\n#include <stdio.h>\n```\n&lt;i>"),
        ("~~~\n<i>\n~~~\n<i>", "~~~\n<i>\n~~~\n&lt;i>"),
        ("- one\n\n  ```c\n  #include <stdio.h>\n  ```\n", "- one\n\n  ```c\n  #include <stdio.h>\n  ```\n"),
        ("```\n<b> not closed yet", "```\n<b> not closed yet"),
        ("- item\n\n  ```\n<b>\n  ```\n<b>", "- item\n\n```\n<b>\n```\n&lt;b>"),  # the line ends the item, and so the code
        ("```\n```~\n<b>", "```\n```\n&lt;b>"),
        ("~~~a~`b\n<b>", "~~~ab\n<b>"),
        ("2 ` 3 <b>\n` <i>", "2 ` 3 &lt;b>\n` &lt;i>"),
        ("$$ a < b $$ and a < b", f"{SHOW}a &#60; b{WELL} and a &lt; b"),
        ("\\[\na_1\n\\]", f"{SHOW}a&#95;1{WELL}"),
        ("$x^2$ and \\(y\\)", f"{IN}x&#94;2{OUT} and {IN}y{OUT}"),
        ("It costs $5 and $10, or US$5/A$6.", "It costs $5 and $10, or US$5/A$6."),
        ("`$x$` and $y$", f"<code>&#36;x&#36;</code> and {IN}y{OUT}"),
        ("```sh\necho $$ $HOME \\( $x$ \\)\n```", "```sh\necho $$ $HOME \\( $x$ \\)\n```"),
        ("$$\n```\n$$\n<b>\n```", "$$\n```\n$$\n<b>\n```"),
        ("a \\$x$ b", "a \\$x$ b"),
        ("$$ a\n\n b $$", "$$ a\n\n b $$"),
        (f"{IN}\\href{{javascript:x}}{{y}}{OUT}", "\\href{javascript:x}{y}"),
        (f"![a cat]({OUTSIDE})", f"[Image: a cat]({OUTSIDE})"),
        (f"`![a]({OUTSIDE})`", "<code>&#33;&#91;a&#93;&#40;http&#58;&#47;&#47;outside&#46;invalid&#47;x&#46;png&#41;</code>"),
        ("![a][b]", r"!\[a][b]"),
        ("Wow![1]", r"Wow!\[1]"),
    ],
)
def test_a_message_keeps_its_look(markdown, shown):
    assert safe_markdown(markdown) == shown


@pytest.mark.parametrize(
    "markdown",
    [
        "<i> ``` <img src=x> ```",  # a fence begins a line
        "text ```\n<img src=x>",
        r"\`<img src=x>\`",
        "> ```\n<img src=x>\n> ```",
        "$$ <img src=x> $$",
        "```a`b\n<img src=x>\n```",
        "````\n<b>\n```\n````\n<img src=x>",
        "```<b>````x````\n<img src=x>",
        "    ```\n<img src=x>",
        "```\r<b>\r```\r<img src=x>",
        "\u2028```\n<img src=x>",
        "\t```\n<img src=x>",
    ],
)
def test_a_tag_that_only_looks_like_code_is_escaped(markdown):
    assert "<img" not in safe_markdown(markdown)


@pytest.mark.parametrize(
    "fence", ["```mermaid", "~~~ mermaid", "``` Mermaid x", "```\ufeffmermaid", "  ```mermaid", "````\u3000mermaid\t"]
)
@pytest.mark.parametrize(
    "tag",
    [
        "<button class=gw-act>",
        "</b>",
        "<<img src=x>",
        "<<<i>>",
        "<!-- x -->",
        "<br onclick=x>",
        "<brx>",
        "<?x>",
        "<a\nhref=x>",
        "<<button>>",
        "&lt;b>",
        "&LTb&gt;",
        "&#60;b>",
        "&#x3c;b>",
        "&#0060b>",
        "&amp;lt;b>",
        "&ampamp;#60;b>",
        "<%%{wrap}%%button>",
        "&l%%{wrap}%%t;b>",
        "style:# <;button>",
        "<",
    ],
)
def test_a_diagram_has_words_and_arrows_and_no_tags(fence, tag):
    """Gradio 6 shows the HTML in a diagram's words, the page's own buttons too."""
    arrows = "A[one<br/>two<br>three] <--> B\nA <|-- B\n<<interface>> a < b"
    closing = fence.strip()[:4].rstrip("m\ufeff ")
    shown = safe_markdown(f'{fence}\ngraph TD\n{arrows}\nC["{tag}"]\n{closing}\nafter')
    assert arrows in shown and re.search("#(lt|amp);", shown) and "&" not in shown and "<%" not in shown and "<;" not in shown
    assert re.findall(r"<+[a-zA-Z/!?][^>]*>*", shown) == ["<br/>", "<br>", "<<interface>>"]


@pytest.mark.parametrize(
    "text",
    [
        "> ```mermaid\n> graph TD\n> A[<b>]\n> ```", "1. ~~~ Mermaid\n   A[<b>]\n   ~~~", "- - ```mermaid\n    A[<b>]",
        "> > ````\tmermaid x\n> > A", "- [ ] ```mermaid\n  A", "      ```mermaid\nA", "> ~~~\ufeffmermaid\n> A",
        "1) > ```mermaidmermaid mermaid\n   > A",
    ],
)  # fmt: skip
def test_a_diagram_within_something_else_is_shown_as_code(text):
    """There `<` is written as an entity, which a diagram would read as `<`."""
    for line in safe_markdown(text).split("\n"):
        assert not re.search(r"(`{3,}|~{3,})\s*\ufeff?mermaid(\s|$)", line, re.IGNORECASE), line


@pytest.mark.parametrize("escape", [r"\x3c", r"\u003c", r"\U0000003C"])
def test_an_escape_in_a_diagram_is_words(escape):
    shown = safe_markdown(f'```mermaid\nflowchart\nA@{{ label: "{escape}button class=gw-act>" }}\n```')
    assert f"#92;{escape[1:]}button" in shown and escape not in shown


@pytest.mark.parametrize("text", ["you write ~~~ and then mermaid", r"Type \``` mermaid", "mermaid ~~~"])
def test_prose_about_diagrams_stays_what_it_is(text):
    assert "mermaid" in safe_markdown(text) and "diagram" not in safe_markdown(text)


@pytest.mark.parametrize("piece", ["~", "`", "> ", "~~~ ", "``` ", "```mermaid ", "&", "<"])
def test_a_long_message_about_diagrams_takes_no_time(piece):
    began = time.process_time()
    safe_markdown("mermaid\n> " + piece * 20_000)
    safe_markdown("```mermaid\n" + piece * 20_000)
    assert time.process_time() - began < 2


def test_a_block_of_code_that_is_no_diagram_keeps_its_tags():
    assert safe_markdown("```html\n<b>mermaid</b>\n```") == "```html\n<b>mermaid</b>\n```"


def test_no_tag_and_no_image_outside_of_blocks_that_every_parser_takes_for_code():
    """Against a parser of the CommonMark standard, with random texts of the pieces that matter."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    pieces = ["```", "~~~", "`", "``", "$$", "$", "\\(", "\\)", "<img src=x>", "![a](b)", "![a][b]", "a", "\\"]
    pieces += ["\n", "\n\n", "  ", "    ", "- ", "> ", "1. "]
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 25)))
        for token in parser.parse(safe_markdown(text)):
            inside = [token, *(token.children or [])]
            assert not any(each.type == "image" for each in inside), text
            html = "".join(each.content for each in inside if each.type in ("html_inline", "html_block"))
            assert not re.sub(r"</?code>", "", html), text


@pytest.mark.parametrize(
    "piece",
    ["`", "``a`", "$", "$a", "$a ", "$ a", "\\(", "\\[ \\] ", "$$a", "\\", " ```x\n", "![", "$$", "<",
     "```\n", "\\`", " ~~~a\n", "[", "!["],
)  # fmt: skip
def test_a_hostile_megabyte_takes_less_than_a_moment(piece):
    text = piece * (1_000_000 // len(piece)) + "\n<x"
    began = time.process_time()
    safe_markdown(text)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("piece", ["> ", "- ", "1. ", "> - ", "*a ", "**a*", "_", "[a](", "![", "\\[", "`a", "~~a "])
def test_what_takes_a_parser_too_long_is_shown_as_characters(piece):
    text = "Before *this*.\n\n" + piece * 20_000 + "x\n\nAfter *it*."
    began = time.process_time()
    shown = safe_markdown(text)
    assert time.process_time() - began < 3
    before, flood, after = shown.split("\n\n")
    assert (before, after) == ("Before *this*.", "After *it*.")
    assert "".join(html.unescape(flood).split()) == "".join((piece * 20_000 + "x").replace("\\[", "[").split())
    assert len(re.findall(r"[*_~\[\]!\\`<]", flood)) < 2000 and re.match(r"(?:\s*(?:>|-|\d+\.)(?=\s)){13}", flood) is None


def test_a_long_text_with_marks_in_every_line_is_left_alone():
    lines = "\n".join(f"- **item {at}** is _here_, [there](http://a.example/{at}) and ~~gone~~" for at in range(3000))
    nested = "\n".join("  " * (at % 10) + "- x" for at in range(1000))
    assert safe_markdown(lines) == lines and safe_markdown(nested) == nested and safe_markdown("> " * 12 + "x") == "> " * 12 + "x"
