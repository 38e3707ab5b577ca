"""gptq/guessing.py: what is guessed, and when it pays."""

import random

from gptq_webui.gptq.guessing import MOST_GUESSES, Guesser

CHEAP = [1 + 0.05 * more for more in range(MOST_GUESSES + 1)]
DEAR = [1.0 + more for more in range(MOST_GUESSES + 1)]


def test_what_followed_the_same_words_is_guessed():
    guesser = Guesser([5, 6, 7, 8, 9, 10, 1, 2, 5, 6, 7])
    assert guesser.guess(CHEAP)[:3] == [8, 9, 10]
    guesser.add(8)
    assert guesser.guess(CHEAP)[:2] == [9, 10]


def test_nothing_is_guessed_where_nothing_repeats_or_a_row_costs_as_much_as_a_pass():
    assert Guesser(list(range(50))).guess(CHEAP) == []
    assert Guesser([1, 2, 3, 1, 2]).guess(DEAR) == []
    assert Guesser([]).guess(CHEAP) == Guesser([4]).guess(CHEAP) == []


def test_it_never_guesses_more_rows_than_there_is_room_for():
    guesser = Guesser([1, 2, 3, 4, 5, 6, 7, 8, 9] * 3)
    assert guesser.guess([1.0]) == [] and len(guesser.guess([1.0, 1.1])) == 1


def test_a_conversation_whose_matches_mislead_is_guessed_less():
    """Every pair comes again, but what follows it is always another token."""
    numbers = random.Random(0)
    guesser, before, after = Guesser([]), 0, 0
    for at in range(3000):
        guesser.add(numbers.randrange(12))
        found = len(guesser.guess([1 + 0.2 * more for more in range(MOST_GUESSES + 1)]))
        if at < 300:
            before += found
        elif at >= 2700:
            after += found
    assert after < 30 and after <= before


def test_a_conversation_that_repeats_is_guessed_more():
    text = [*range(40), 99]
    guesser = Guesser(text)
    for id in text * 2:
        guesser.add(id)
    assert len(guesser.guess([1 + 0.2 * more for more in range(MOST_GUESSES + 1)])) == MOST_GUESSES
