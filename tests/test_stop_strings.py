"""loaders/text/stop_strings.py: an answer ends before its stop string, however that arrives."""

import pytest

from gptq_webui.loaders.text.stop_strings import StopStrings


def feed(stop, pieces):
    strings = StopStrings(stop)
    given = [strings.feed(piece) for piece in pieces]
    return "".join(given) + ("" if strings.found else strings.end()), strings.found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("Paris.\nUSER: more", "Paris.\n", "USER:"),
        ("US of A", "US of A", None),
        ("a ### b ### Instruction: c", "a ### b ", "### Instruction:"),
        ("ends with ### Ins", "ends with ### Ins", None),
        ("USUSER: x", "US", "USER:"),
    ],
)
def test_text_in_pieces_of_any_size_is_cut_at_the_same_place(text, wanted, found, size):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert feed(("USER:", "### Instruction:"), pieces) == (wanted, found)


def test_the_first_of_two_stop_strings_wins():
    assert feed(("b", "a"), ["xxab"]) == ("xx", "a")


def test_text_that_cannot_become_a_stop_string_is_not_held_back():
    strings = StopStrings(("</end>",))
    assert strings.feed("hello") == "hello"
    assert strings.feed(" <") == " "
    assert strings.feed("b>") == "<b>"


def test_without_stop_strings_everything_passes():
    assert feed((), ["a", "b"]) == ("ab", None)
