"""ui/message_markdown.py: a message as a Chatbot gets it."""

import random
import time

import pytest

from gptq_webui.ui.message_markdown import LiveMarkdown, message_markdown


def test_a_thought_is_folded_with_its_time():
    shown = message_markdown("<think>\nhm <b>\n</think>\n\nParis.", thinking_s=75)
    fold = '<details class="gw-think"><summary>Thought for 1 min 15 s</summary>'
    assert shown == f"{fold}\n\nhm &lt;b>\n\n</details>\n\nParis."


def test_a_thought_that_goes_on_is_open_while_it_is_written_and_folded_after_stop():
    assert message_markdown("<think>hm", live=True).startswith('<details class="gw-think" open><summary>Thinking …')
    assert message_markdown("<think>hm").startswith('<details class="gw-think"><summary>Thought</summary>')
    assert message_markdown("hm", begun=True, live=True).startswith("<details")


def test_nothing_that_was_thought_leaves_its_fold():
    """Against a parser of the CommonMark standard, with random texts of the pieces that matter."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    pieces = ["```", "````", "~~~", "`", "$$", "</details>", "<summary>", "a", "\n", "\n\n", "  ", "    ", "- ", "> ", "1. "]
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 25)))
        tokens = parser.parse(message_markdown(f"<think>x {text}</think>\n\nThe answer."))
        html = [at for at, each in enumerate(tokens) if each.type == "html_block"]
        assert [tokens[at].content.strip()[:9] for at in html] == ["<details ", "</details"], text
        answer = next(at for at, each in enumerate(tokens) if each.content == "The answer.")
        assert answer > html[1] and tokens[answer].level == 1, text


def test_a_message_being_written_looks_as_it_will_when_finished():
    text = "<think>\n" + "why\n\n" * 3000 + "</think>\n\n"
    text += (
        "".join(f"## Step {at}\n\n```python\nx = '<b>'\n\n\ny = {at}\n```\n\nSo $x_{at}$ <i>.\n\n" for at in range(400)) + "End."
    )
    live = LiveMarkdown()
    for end in [*range(0, len(text), 997), len(text)]:
        shown = live.update(text[:end], 3.0)
    assert shown == message_markdown(text, thinking_s=3.0)
    assert live.update("another", None) == "another"


def test_ten_thousand_lines_take_less_than_a_moment_and_a_new_token_far_less():
    text = "".join(f"Line {at} with `code`, $x_{at}$ and <b>.\n" + "\n" * (at % 5 == 0) for at in range(10_000))
    began = time.process_time()
    message_markdown(text)
    assert time.process_time() - began < 2
    live = LiveMarkdown()
    live.update(text)
    began = time.process_time()
    for at in range(20):  # one second of an answer
        live.update(text + "word " * at)
    assert time.process_time() - began < 1
