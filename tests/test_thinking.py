"""core/thinking.py: what a model thought is told from what it says."""

import time

import pytest

from gptq_webui.core.thinking import Part, ThoughtReader, ThoughtTimer, begun_by, marks_in, parts_of, without_thoughts


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nhm\n</think>\n\nParis.",
        "<thinking>hm</thinking>Paris.",
        "<seed:think>hm</seed:think>Paris.",
        "[THINK]hm[/THINK]Paris.",
        "◁think▷hm◁/think▷Paris.",
        "<|channel>thought\nhm\n<channel|>Paris.",
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Paris.<|END_RESPONSE|>",
        "<|begin_of_thought|>hm<|end_of_thought|>\n<|begin_of_solution|>Paris.<|end_of_solution|>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>",
        "<|inner_prefix|>hm<|inner_suffix|>Paris.",
        "  <think>hm</think> Paris.",
    ],
)
def test_every_mark_is_read(text):
    parts = parts_of(text)
    assert [(each.text.strip(), each.is_thought, each.is_open) for each in parts] == [
        ("hm", True, False),
        ("Paris.", False, False),
    ]
    assert without_thoughts(text) == "Paris."


@pytest.mark.parametrize(
    "text",
    [
        "Paris.",
        "Use `<think>` and `</think>` around it.",
        "```xml\n<think>\nhm\n</think>\n```\nParis.",
        "~~~\n</think>\n~~~",
        "The tag <think> opens.",
        "I think so.",
    ],
)
def test_words_about_marks_are_no_thoughts(text):
    assert parts_of(text) == [Part(text)]


def test_a_thought_that_the_prompt_has_opened():
    assert begun_by("<|im_start|>assistant\n<think>\n") and not begun_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert parts_of("hm", begun=True) == [Part("hm", True, True)]
    assert parts_of("hm\n</think>\nParis.") == parts_of("hm\n</think>\nParis.", begun=True)
    assert parts_of("hm\n</think>\nParis.") == [Part("hm", True), Part("Paris.")]
    assert parts_of("<think>hm</think>Paris.", begun=True) == [Part("hm", True), Part("Paris.")]


def test_a_thought_that_is_being_written_is_open_and_shows_no_half_of_a_mark():
    whole = "<think>\nhm, yes\n</think>\nParis."
    for end in range(8, whole.index("</think>") + 8):
        (part,) = parts_of(whole[:end])
        assert part.is_thought and part.is_open and "<" not in part.text
    assert parts_of("<think></think>Paris.") == [Part("Paris.")]


def test_several_thoughts_in_one_answer():
    text = "<think>one</think>\nFirst.\n\n<think>two</think>\nSecond."
    assert [each.text.strip() for each in parts_of(text)] == ["one", "First.", "two", "Second."]
    assert [each.is_thought for each in parts_of(text)] == [True, False, True, False]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think>a</think>\n", "```\n", "~~~~\n```\n", "<|", "[THINK]"])
def test_a_hostile_megabyte_takes_less_than_a_moment(piece):
    began = time.process_time()
    parts_of(piece * (1_000_000 // len(piece)))
    assert time.process_time() - began < 3


def read(text, prompt="", size=1):
    """What a ThoughtReader makes of a text that comes in pieces."""
    reader, said, thought = ThoughtReader(prompt), "", ""
    for at in range(0, len(text), size):
        new = reader.feed(text[at : at + size])
        said, thought = said + new[0], thought + new[1]
    left = reader.end()
    return said + left[0], thought + left[1]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "prompt", "wanted"),
    [
        ("<think>\nHm, a < b.\n</think>\n\nParis.", "", ("Paris.", "Hm, a < b.")),
        ("\nHm.\n</think>\n\nParis.", "<|im_start|>assistant\n<think>\n", ("Paris.", "Hm.")),
        ("<think>\nHm.</think>Paris.", "<think>\n", ("Paris.", "Hm.")),  # the mark of the prompt is repeated
        ("<think>\n\n</think>\n\nParis.", "", ("Paris.", "")),
        ("[THINK]Hm.[/THINK]Paris.", "", ("Paris.", "Hm.")),
        ("<|channel>thought\nHm.<channel|>Paris.", "", ("Paris.", "Hm.")),
        ("<think>a</think>\n<think>b</think>\nParis <think>c</think>", "", ("Paris <think>c</think>", "ab")),
        ("A <think> tag.", "", ("A <think> tag.", "")),
        ("  <thin air", "", ("  <thin air", "")),
        ("<thi", "", ("<thi", "")),
        ("<think>cut </thi", "", ("", "cut </thi")),
        ("Hm.", "<think>", ("", "Hm.")),
        ("", "<think>", ("", "")),
    ],
)
def test_a_stream_has_its_first_thought_apart(text, prompt, wanted, size):
    assert read(text, prompt, size) == wanted


def test_marks_of_a_template():
    assert marks_in("{{ content.split('</think>')[-1] }}") == ("<think>", "</think>")
    assert marks_in("<|channel|>analysis<|message|>") == () == marks_in("plain")


@pytest.mark.parametrize(
    ("text", "begun", "seconds"),
    [
        ("<think>I think here</think>Hello", False, 26),
        ("I think</think>Hello and more", True, 14),
        ("Hello, I write about <think> and </think>", False, None),
        ("<think>never said", False, 16),
        ("", True, None),
    ],
)
def test_a_thought_is_timed_while_it_is_written(text, begun, seconds):
    timer = ThoughtTimer(begun=begun)
    for at in range(len(text)):
        timer.look(text[: at + 1], float(at))
    assert timer.seconds == seconds


def test_the_time_of_a_continued_thought_is_added():
    timer = ThoughtTimer("<think>half", seconds=5.0)
    timer.look("<think>half a", 100.0)
    timer.look("<think>half a</think>Yes", 102.0)
    assert timer.seconds == 7.0
    timer = ThoughtTimer("<think>x</think>Yes", seconds=5.0)
    timer.look("<think>x</think>Yes, indeed", 200.0)
    assert timer.seconds == 5.0
