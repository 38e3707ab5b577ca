"""gptq/drafting.py: a small model guesses, and every answer stays what it is."""

import random

import pytest
import torch

from gptq_webui.core.errors import BadParameter
from gptq_webui.gptq import drafting
from gptq_webui.gptq.drafting import PIECE_TOKENS, Draft, Drafter
from gptq_webui.gptq.stepper import Memory

COSTS = [1 + 0.1 * more for more in range(8)]


class Clock:
    """Stands still unless a model computes."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(drafting, "perf_counter", clock)
    return clock


class Kept(Memory):
    def __init__(self):
        super().__init__()
        self.ids = []

    length = property(lambda self: len(self.ids))
    size_bytes = 0

    def cut(self, length):
        del self.ids[length:]
        return True

    def fork(self, length):
        other = Kept()
        other.ids = self.ids[:length]
        return other


class Small:
    """Knows a text and says how it goes on, sure of it; after anything else id 0, unsure."""

    embedding_rows = 100

    def __init__(self, text, clock, step_s=0.1):
        self._text, self._clock, self._step_s = list(text), clock, step_s
        self.read, self.closed = 0, False

    def begin_text(self, tokens):
        return Kept()

    def prefill(self, memory, ids):
        memory.ids += ids
        self.read += len(ids)
        self._clock.now += self._step_s
        logits = torch.zeros(1, 100)
        if memory.ids == self._text[: len(memory.ids)] and len(memory.ids) < len(self._text):
            logits[0, self._text[len(memory.ids)]] = 20
        return logits

    def close(self):
        self.closed = True


def text_of(length, seed=0):
    return random.Random(seed).choices(range(1, 100), k=length)


def passes_of(drafter, text, given, pass_s=1.0, costs=COSTS):
    """Time for text[given:], in passes, as the batch asks for guesses."""
    took, ahead = 0.0, []
    for id in text[given:]:
        drafter.add(id)
        if ahead and ahead[0] == id:
            ahead.pop(0)
            continue
        ahead = drafter.guess(costs, pass_s) if drafter.worth(costs, pass_s) > 1 else []
        took += costs[len(ahead)]
        if ahead:
            drafter.paid(costs[len(ahead)] - 1)
    return took


def test_what_a_token_takes_is_measured_before_it_is_asked(clock):
    draft = Draft(Small(text_of(60), clock, 0.9), 1000, 100)
    draft.measure()
    assert draft.step_s == pytest.approx(0.9) and Drafter(draft, [1, 2]).worth(COSTS, 1.0) == 1
    draft.took(9.0)
    slow = draft.step_s
    for _ in range(40):
        Drafter(draft, [1, 2])
    assert draft.step_s < 1.0 < slow, "one slow moment is no rule"


def test_what_the_small_model_says_is_guessed_while_it_is_sure(clock):
    text = text_of(60)
    small = Small(text, clock, step_s=0.02)
    drafter = Drafter(Draft(small, 1000, 100), text[:20])
    found = drafter.guess(COSTS, 1.0)
    assert len(found) >= 3 and found == text[20 : 20 + len(found)]
    lost = Drafter(Draft(Small(text_of(60, seed=1), clock, 0.02), 1000, 100), text[:20])
    assert lost.guess([1.0, 1.3, 1.6], 1.0) == [], "it is not sure of anything"


def test_a_small_model_that_takes_as_long_as_the_large_one_is_hardly_asked(clock):
    text = text_of(600)
    for step_s, most in ((1.0, 30), (0.05, 200)):
        small = Small(text, clock, step_s)
        drafter = Drafter(Draft(small, 1000, 100), text[:20])
        began = clock.now
        took = passes_of(drafter, text, 20) + clock.now - began
        assert (small.read < most) == (step_s == 1.0)
        assert took < 580 * (1.05 if step_s == 1.0 else 0.6)


def test_where_its_guesses_are_wrong_it_rests_longer_and_longer(clock, monkeypatch):
    """It is sure, and never right."""
    text = text_of(4000)
    small = Small(text, clock, 0.05)
    monkeypatch.setattr(Small, "prefill", wrong(Small.prefill))
    drafter = Drafter(Draft(small, 9000, 100), text[:20])
    began = clock.now
    took = passes_of(drafter, text[:2000], 20) + clock.now - began
    early = small.read
    took += passes_of(drafter, text, 2000) + clock.now - began
    assert took < 1.03 * 3980
    assert drafter._rest > 4 * drafting._REST or early == small.read


def test_a_new_conversation_may_be_unlike_those_in_which_it_was_wrong(clock):
    """Where it was never right it is not asked at first, and after some conversations once more."""
    text = text_of(40)
    draft = Draft(Small(text, clock, 0.2), 1000, 100)
    draft.step_s, draft.usual = 0.2, 0.0
    asked = [Drafter(draft, text[:20]).worth(COSTS, 1.0) > 1 for _ in range(12)]
    assert not asked[0] and asked[-1]


def wrong(prefill):
    def other(self, memory, ids):
        return prefill(self, memory, ids).roll(1, 1)

    return other


def test_a_prompt_is_read_in_pieces_before_anything_is_guessed(clock):
    text = text_of(PIECE_TOKENS * 2 + 50)
    small = Small(text, clock, 0.01)
    drafter = Drafter(Draft(small, 9000, 100), text[:-20])
    assert drafter.guess(COSTS, 1.0) == [] and small.read == PIECE_TOKENS
    assert drafter.guess(COSTS, 1.0) == [] and small.read == 2 * PIECE_TOKENS
    assert drafter.guess(COSTS, 1.0)


def test_the_next_turn_begins_where_the_last_one_ended(clock):
    text = text_of(300)
    small = Small(text, clock, 0.01)
    draft = Draft(small, 9000, 100)
    drafter = Drafter(draft, text[:200])
    drafter.guess(COSTS, 1.0)
    drafter.close()
    before = small.read
    later = Drafter(draft, text[:230])
    assert later.guess(COSTS, 1.0) and small.read - before <= 30 + 8
    draft.close()
    assert small.closed


def test_ids_that_the_small_model_does_not_have_and_its_context_end_its_guesses(clock):
    text = text_of(60)
    draft = Draft(Small(text, clock, 0.01), 40, 100)
    assert Drafter(draft, text[:20]).worth(COSTS, 1.0) > 1 and Drafter(draft, text[:40]).worth(COSTS, 1.0) == 1
    assert len(Drafter(draft, text[:38]).guess(COSTS, 1.0)) <= 2
    assert Drafter(draft, [*text[:20], 100]).worth(COSTS, 1.0) == 1
    drafter = Drafter(draft, text[:20])
    assert drafter.worth(COSTS, None) == 1, "nothing is measured yet"
    drafter.add(100)
    assert drafter.worth(COSTS, 1.0) == 1
    scarce = Drafter(Draft(Small([4] * 3 + [5] * 60, clock, 0.01), 1000, 5), [4] * 3)
    assert scarce.guess(COSTS, 1.0) == [], "the large model has no id 5"


def test_a_small_model_that_fails_ends_no_answer(clock, monkeypatch):
    def fails(self, memory, ids):
        raise BadParameter("too long")

    monkeypatch.setattr(Small, "prefill", fails)
    drafter = Drafter(Draft(Small(text_of(60), clock), 1000, 100), text_of(20))
    assert drafter.guess(COSTS, 1.0) == [] and drafter.worth(COSTS, 1.0) == 1
    drafter.close()
