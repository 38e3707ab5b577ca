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


def passes(guesser, text, costs, real=None):
    """What the text takes, in passes of one row, where each pass computes what the guesser says. `real`: what it takes indeed."""
    took, ahead = 0.0, []
    for id in text:
        guesser.add(id)
        if ahead and ahead[0] == id:
            ahead.pop(0)
            continue
        ahead = guesser.guess(costs)
        cost = (real or costs)[len(ahead)]
        took += cost
        if ahead:
            guesser.paid(cost - 1)
    return took


def half_right(count):
    """A text known before, and one in which pieces of it come again, of which some go on as before."""
    numbers = random.Random(1)
    known = [numbers.randrange(1000) for _ in range(300)]
    text = []
    while len(text) < count:
        at = numbers.randrange(280)
        text += [*known[at : at + numbers.randrange(3, 7)], *(numbers.randrange(1000, 50_000) for _ in range(6))]
    return known, text[:count]


def test_where_rows_cost_more_than_was_assumed_guesses_stop():
    assumed, real = ([1 + each * more for more in range(MOST_GUESSES + 1)] for each in (0.2, 2.5))
    known, text = half_right(400)
    assert passes(Guesser(known), text, assumed, real) <= 1.02 * len(text)
    assert passes(Guesser(known), text, assumed) < len(text)  # and go on where the assumption holds


def test_they_come_back_when_the_text_begins_to_repeat():
    numbers = random.Random(2)
    costs = [1 + 0.35 * more for more in range(MOST_GUESSES + 1)]
    known = [numbers.randrange(1000) for _ in range(200)]
    guesser = Guesser(known)
    misleading = [id for at in range(0, 196, 4) for id in (*known[at : at + 3], numbers.randrange(1000, 50_000))]
    passes(guesser, misleading * 2, costs)
    assert passes(guesser, known * 2, costs) < 0.7 * 400


def test_what_follows_a_token_that_is_not_known_yet_is_guessed_with_it():
    ids = [5, 6, 7, 8, 9, 10, 1, 2, 5, 6, 7]
    guesser = Guesser(ids)
    assert guesser.matches and guesser.guess(CHEAP, after=1)[:3] == [8, 9, 10]
    assert Guesser([1, 2, 3, 1, 2]).guess([1.0, 1.01], after=1) == [3, 1]
    assert Guesser([1, 2, 1, 2]).guess([1.0], after=1) == [], "nothing may be guessed behind it"
    assert not Guesser([1, 2, 3]).matches


def test_a_loop_is_guessed_beyond_its_last_round():
    assert Guesser([4, 9, 9, 9, 9]).guess(CHEAP) == [9] * MOST_GUESSES
    assert Guesser([1, 2, 3] * 4).guess(CHEAP, after=1) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_token_that_was_computed_anyway_counts_as_no_gain():
    late, early = Guesser([5, 6, 7, 8, 9] * 3), Guesser([5, 6, 7, 8, 9] * 3)
    costs = [1.0, 1.4]
    assert len(late.guess(costs, after=1)) == 2 and len(early.guess(costs)) == 1
    assert late._balance == early._balance
    late.add(5)
    assert late._balance == early._balance, "it comes without a guess"
    late.add(6)
    early.add(5)
    assert late._balance == early._balance > 0.5
    wrong = Guesser([5, 6, 7, 8, 9] * 3)
    wrong.guess(costs, after=1)
    before = wrong._balance
    wrong.add(8)
    wrong.add(6)
    assert wrong._balance == before, "guesses behind another token are lost"
