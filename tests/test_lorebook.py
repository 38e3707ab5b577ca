"""engine/lorebook.py: where the words of a lorebook are looked for, and books that would hold a thread."""

import random
import time

import pytest

from gptq_webui.core.character import Lorebook, LoreEntry
from gptq_webui.engine import lorebook


def is_there(key, text):
    """By the definition: at some place, and neither neighbour continues the word."""
    return any(
        text.startswith(key, at)
        and not lorebook._joins(text[:at][-1:], key[0])
        and not lorebook._joins(key[-1], text[at + len(key) :][:1])
        for at in range(len(text))
    )


@pytest.mark.parametrize("letters", ["ab ", "aé b-", "aส b日本", "ab"])
def test_a_word_is_found_where_it_stands_alone(letters):
    rng = random.Random(7)
    found = []
    for _ in range(2000):
        text, key = ("".join(rng.choices(letters, k=rng.randint(least, most))) for least, most in ((0, 25), (1, 4)))
        book = Lorebook((LoreEntry("c", (key,), case_sensitive=True),))
        found.append(bool(lorebook.applying(book, [text])))
        assert found[-1] == is_there(key, text), (text, key)
    assert 100 < sum(found) < 1900 or letters == "ab"


def book_of(*keys):
    return Lorebook(tuple(LoreEntry("c", keys[at : at + 40]) for at in range(0, len(keys), 40)))


@pytest.mark.parametrize("book", [
    book_of(*("a" * (10 + at % 80) for at in range(20_000))),
    book_of(*("a" * (90 - at % 60) + "b" + "a" * (at % 9) + str(at) for at in range(20_000))),
    Lorebook(tuple(LoreEntry("a" * 20_000, ("a" * (10 + at % 50),), constant=not at) for at in range(1000)), recursive=True),
], ids=["inside of a word", "nearly there", "called by itself"])  # fmt: skip
def test_a_book_cannot_hold_the_thread(book):
    """The first one took 69 s."""
    began = time.thread_time()
    lorebook.applying(book, ["a" * 20_000])
    assert time.thread_time() - began < 3
