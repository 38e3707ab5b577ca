"""app/markdown_writer.py and app/safe_terminal.py: what reaches a terminal."""

import io
import re
import sys

import pytest

from gptq_webui.app import markdown_writer
from gptq_webui.app.safe_terminal import SafeStream, raw, safe_text


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch):
    """To be called in the test: stdout becomes a terminal of 80 columns and 24 lines."""

    def begin():
        found = Screen()
        monkeypatch.setattr(sys, "stdout", SafeStream(found))
        for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24")):
            monkeypatch.setenv(name, value)
        return found

    return begin


def test_control_characters_become_text_and_letters_stay():
    assert safe_text("a\x1b[2J\x9b\r\nb\tc\rd\u202e\ud800") == "a\\x1b[2J\\x9b\nb\tc\\rd\\u202e\\ud800"
    assert safe_text("Grüße, שלום\u200f, 👩\u200d👧 日本") == "Grüße, שלום\u200f, 👩\u200d👧 日本"


def test_print_escapes_and_the_stream_below_does_not(screen):
    screen = screen()
    print("a\x1b[31m", "b")
    raw(sys.stdout).write("\x1b[K")
    assert screen.getvalue() == "a\\x1b[31m b\n\x1b[K"
    assert raw(screen) is screen and sys.stdout.isatty()


@pytest.mark.parametrize(
    "entity",
    ["&#27;[2J", "&#x9b;2J", "&#8238;x", "\x1b[2J", "`\x1b[2J`", "    \x1b[2J", "```\x1b[2J\nx\n```", "| \x1b[2J |\n|---|"],
)
def test_markdown_cannot_smuggle_a_control_character(screen, entity):
    screen = screen()
    shown = markdown_writer.writer(plain=False)
    assert isinstance(shown, markdown_writer.MarkdownWriter)
    shown.add(f"before\n\n{entity}\n\nafter")
    shown.end()
    assert not any(each in screen.getvalue() for each in ("\x1b[2J", "\x9b", "\u202e")) and "after" in screen.getvalue()


def test_what_is_complete_is_printed_once_however_long_the_answer_is(screen):
    screen = screen()
    shown = markdown_writer.MarkdownWriter()
    for at in range(60):
        shown.add(f"Paragraph {at}.\n\n")
        shown._next_s = 0.0  # as if a tenth of a second had passed
    length = len(screen.getvalue())
    shown.add("The last one.")
    assert len(screen.getvalue()) - length < 400, "a new word does not draw the answer again"
    shown.end()
    assert screen.getvalue().count("Paragraph 7.") <= 4


def test_long_code_comes_in_pieces_without_a_gap(screen):
    screen = screen()
    shown = markdown_writer.MarkdownWriter()
    shown.add("```python\n")
    for start in range(0, 3000, 100):
        shown._next_s = 0.0
        shown.add("".join(f"line_{at} = 1\n" for at in range(start, start + 100)))
        assert len(shown._open) < 10_000, "what is rendered again stays small"
    shown.add("```\nThe end.")
    shown.end()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [each.strip() for each in text.replace("\r", "\n").split("\n")]
    printed = lines[max(at for at, each in enumerate(lines) if each == "line_0 = 1") :]
    assert all(f"line_{at} = 1" in lines for at in (0, 5, 1000, 2999)) and "The end." in printed


def test_an_open_block_that_is_higher_than_the_terminal_shows_its_end(screen):
    screen = screen()
    shown = markdown_writer.MarkdownWriter()
    shown.add("".join(f"- item {at}\n" for at in range(300)))
    assert "item 299" in screen.getvalue() and "item 5 " not in screen.getvalue()
    shown.end()
    assert "item 5 " in screen.getvalue()


def test_drawing_waits_longer_the_longer_it_takes(screen, monkeypatch):
    screen()
    shown = markdown_writer.MarkdownWriter()
    now = [100.0]

    def render(text):
        now[0] += 1.0
        return text

    monkeypatch.setattr(markdown_writer, "_markdown", render)
    monkeypatch.setattr(markdown_writer.time, "monotonic", lambda: now[0])
    shown.add("one")
    assert now[0] == 101.0 and shown._next_s == 105.0
    shown.add("two")
    assert now[0] == 101.0, "not drawn again so soon"
    shown.end()


def test_without_a_terminal_the_text_comes_as_it_is(monkeypatch):
    found = io.StringIO()
    monkeypatch.setattr(sys, "stdout", SafeStream(found))
    shown = markdown_writer.writer(plain=False)
    shown.add("**a**")
    shown.end()
    assert found.getvalue() == "**a**\n"
