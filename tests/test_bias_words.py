"""loaders/text/bias_words.py: words with a bias, and their tokens."""

import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.loaders.contract.fake_loader import FakeTokenizer
from gptq_webui.loaders.text.bias_words import BiasedWord, ids_of, read_lines
from gptq_webui.loaders.text.token_codec import TokenCodec


def test_a_line_is_a_word_or_an_id_and_a_number():
    text = 'sorry: -5\n\n#7: 2.5\n"#7": 1\ntime: now: -1\n: : 3'
    assert read_lines(text, -100, 100) == [
        BiasedWord("sorry", -5.0), BiasedWord("", 2.5, 7), BiasedWord("#7", 1.0), BiasedWord("time: now", -1.0),
        BiasedWord(":", 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["sorry", "sorry -5", "sorry:", ": 5", "sorry: five", "sorry: nan"])
def test_another_line_is_named(line):
    with pytest.raises(BadParameter, match=r"Line 2 of Logit bias is .* Write a word, a colon and a number"):
        read_lines(f"a: 1\n{line}", -100, 100)


def test_numbers_and_lines_have_limits():
    with pytest.raises(BadParameter, match=r"Line 1 .* between -100 and 100; found 101"):
        read_lines("a: 101", -100, 100)
    with pytest.raises(BadParameter, match="may have 200 lines"):
        read_lines("a: 1\n" * 201, -100, 100)


def test_a_word_is_biased_within_a_sentence_and_at_its_beginning():
    codec = TokenCodec(FakeTokenizer())
    first, inside, last = (codec.encode(text, bos=False)[0] for text in ("very", " very", " sorry"))
    found = dict(ids_of(read_lines("very sorry: -5\n#2000000: 3\n#0: 1", -100, 100), codec))
    assert found == {first: -5.0, inside: -5.0, last: -5.0}  # no token of that id, and the end token stays as it is


def test_the_last_line_of_a_token_counts():
    codec = TokenCodec(FakeTokenizer())
    assert set(dict(ids_of(read_lines("a: 1\na: 2", -100, 100), codec)).values()) == {2.0}
