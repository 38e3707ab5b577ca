"""Many answers beside each other: rows, pages, turns, and what happens where there are too few of them. Runs on any machine."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_model import PagedModel, paged_stepper, prompt_of

from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda.batch_step import ROWS
from gptq_webui.gptq.cuda.kernel_arguments import PAGE_TOKENS
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache

GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
SAMPLED = replace(GREEDY, temperature=1, top_k=0, top_p=1, seed=7)


class Letters:
    """A grammar: every token is larger than the one before, and 60 ends it."""

    def __init__(self):
        self.last = -1

    def allowed(self, size):
        return torch.arange(size) > self.last

    def bits(self, size):
        return np.packbits(self.allowed(size).numpy(), bitorder="little").tobytes()

    def take(self, id):
        assert id > self.last
        self.last = id

    @property
    def complete(self):
        return self.last >= 60


class Run:
    """Answers of one stepper, in turns as the worker gives them."""

    def __init__(self, context=1024, pages=None, limit=256, kept=4, guesses=False, model=None):
        self.model = model or PagedModel(context, pages)
        self.stepper = paged_stepper(self.model, limit, guesses)
        self.stepper.chunk_tokens = 128
        self.prefix = PrefixCache(kept)
        self.stepper.page_room.prefix = self.prefix
        self.context, self.open, self.found = context, {}, {}

    def ask(self, name, ids, params=GREEDY, mask=None, ends=()):
        cancel = threading.Event()
        events = generate(
            self.stepper, ids, params, cancel, prefix=self.prefix, end_ids=ends, context_tokens=self.context, grammar_mask=mask
        )
        self.open[name], self.found[name] = events, []
        return cancel

    def turn(self):
        for name in list(self.open):
            self.turn_of(name)

    def turn_of(self, name):
        if name not in self.open:
            return
        try:
            event = next(self.open[name], Finish)
        except Exception as error:
            event = error
            del self.open[name]
        if event is Finish:
            del self.open[name]
        elif event is not None:
            self.found[name].append(event)

    def all(self):
        turns = 0
        while self.open:
            self.turn()
            turns += 1
            assert turns < 20_000, "nobody goes on"
        return {name: [each.id for each in events if isinstance(each, Step)] for name, events in self.found.items()}

    def used_pages(self):
        return self.model.pages.used_bytes // self.model.pages.page_bytes


def solo(ids, params=GREEDY, mask=None):
    run = Run()
    run.ask(0, ids, params, mask)
    return run.all()[0]


def test_answers_come_and_go_and_each_is_what_it_is_alone():
    run, wanted, cancels = Run(), {}, {}
    for at in range(70):
        ids, params = prompt_of(at, 5 + 3 * at), replace(SAMPLED if at % 2 else GREEDY, max_new_tokens=10 + at % 30, seed=at)
        wanted[at] = solo(ids, params)
        cancels[at] = run.ask(at, ids, params)
        if at % 3 == 0:
            run.turn()
        if at % 10 == 5:
            cancels[at - 2].set()
    found = run.all()
    for at, ids in found.items():
        assert ids == (wanted[at][: len(ids)] if cancels[at].is_set() else wanted[at]), at
    assert run.model.sequences.rows in (32, 64, 128) and not run.stepper._answers.busy
    assert set(run.model.rows_computed) <= set(ROWS), "fewer answers are computed in fewer rows"


def test_nobody_is_computed_ahead_of_what_is_taken():
    run = Run()
    for at in range(30):
        run.ask(at, prompt_of(at, 20), replace(GREEDY, max_new_tokens=60))
        run.turn()
        assert all(len(each.sampled) <= 1 for each in run.stepper._answers._active)
    counts = [len(each) for each in run.found.values()]
    run.turn()
    assert [len(each) for each in run.found.values()][:28] == [each + 1 for each in counts[:28]], "a token for each in a round"
    run.all()
    assert len(run.model.rows_computed) <= 60 + 30 + 4


def test_rows_are_moved_where_fewer_are_computed_then():
    run = Run()
    for at in range(20):
        run.ask(at, prompt_of(at, 20), replace(GREEDY, max_new_tokens=4 if at != 19 else 40))
    assert run.all()[19] == solo(prompt_of(19, 20))
    assert run.model.rows_computed[-1] == 1


def test_where_no_more_rows_fit_answers_wait_and_nobody_fails():
    run = Run(limit=100)
    grow = run.model.grow

    def full(rows):
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(rows)

    run.model.grow = full
    for at in range(9):
        run.ask(at, prompt_of(at, 30))
    assert run.all() == {at: solo(prompt_of(at, 30)) for at in range(9)}
    assert run.model.sequences.rows == 4


@pytest.mark.parametrize("pages", [9, 12, 20])
def test_where_pages_run_out_the_youngest_waits_and_says_the_same_afterwards(pages):
    run, wanted = Run(pages=pages), {}
    for at in range(8):
        ids, params = prompt_of(at, 60 + 40 * at), replace(SAMPLED, seed=at, max_new_tokens=120)
        wanted[at] = solo(ids, params)
        run.ask(at, ids, params)
        run.turn()
    assert run.all() == wanted
    assert run.model.read_tokens > sum(60 + 40 * at for at in range(8)), "some were read again"
    run.prefix.clear()
    assert run.used_pages() == 0


def test_a_grammar_goes_on_where_it_was_after_its_pages_were_needed():
    run = Run(pages=4)
    run.ask("long", prompt_of(1, 100), replace(GREEDY, max_new_tokens=120))
    run.ask("grammar", prompt_of(2, 62), replace(SAMPLED, max_new_tokens=60), Letters())
    found = run.all()
    assert found["long"] == solo(prompt_of(1, 100), replace(GREEDY, max_new_tokens=120))
    assert found["grammar"] == solo(prompt_of(2, 62), replace(SAMPLED, max_new_tokens=60), Letters())


def test_one_that_cannot_fit_alone_fails_alone():
    run = Run(pages=4)
    run.ask("fits", prompt_of(1, 30))
    run.ask("never", prompt_of(2, 300))
    run.ask("after", prompt_of(3, 30))
    found = run.all()
    assert found["fits"] == solo(prompt_of(1, 30)) and found["after"] == solo(prompt_of(3, 30))
    assert isinstance(run.found["never"][-1], torch.OutOfMemoryError)


def test_a_common_beginning_is_read_once_and_kept_once():
    system = prompt_of(0, 10 * PAGE_TOKENS)
    asked = {at: system + prompt_of(at + 1, 20) for at in range(20)}
    wanted = {at: solo(ids) for at, ids in asked.items()}
    run = Run()
    for at, ids in asked.items():
        run.ask(at, ids)
    for _ in range(30):
        run.turn()
    assert run.model.read_tokens < 640 + 20 * 84 + 64
    assert run.used_pages() <= 10 + 20 * 2, "every answer has its own last pages only"
    assert run.all() == wanted
    run.ask("later", [*system, 1, 2, 3])
    before = run.model.read_tokens
    run.all()
    assert run.model.read_tokens - before <= 3 + 1
    run.prefix.clear()
    assert run.used_pages() == 0


def test_who_writes_into_a_shared_page_writes_into_its_own():
    run = Run()
    ids = prompt_of(3, 200)
    run.ask(0, ids)
    first = run.all()[0]
    for at in range(3):
        run.ask(at, ids[:190])
    again = run.all()
    assert again == {at: solo(ids[:190]) for at in range(3)}
    run.ask(0, ids)
    assert run.all()[0] == first


def test_masks_probabilities_and_samplers_of_pytorch_run_beside_others():
    wanted = {
        "plain": (prompt_of(1, 20), SAMPLED, None),
        "grammar": (prompt_of(2, 20), SAMPLED, Letters),
        "likely": (prompt_of(3, 20), replace(GREEDY, logprobs=2), None),
        "torch": (prompt_of(4, 20), replace(GREEDY, dry_multiplier=0.5), None),
        "both": (prompt_of(5, 20), replace(GREEDY, dry_multiplier=0.5), Letters),
        "biased": (prompt_of(6, 20), replace(GREEDY, logit_bias=((5, 100.0),)), None),
    }
    alone = {name: solo(ids, params, mask() if mask else None) for name, (ids, params, mask) in wanted.items()}
    run = Run()
    for name, (ids, params, mask) in wanted.items():
        run.ask(name, ids, params, mask() if mask else None)
    assert run.all() == alone
    assert alone["biased"] == [5] * 40 and alone["grammar"][-1] >= 60 and sorted(alone["grammar"]) == alone["grammar"]
    for step in run.found["likely"][:-1]:
        assert step.top[0][0] == step.id and len(step.top) == 2 and abs(step.top[0][1] - step.logprob) < 1e-5
    assert run.found["grammar"][-1].reason == "stop"


def test_a_grammar_that_fails_ends_its_own_answer_only():
    class Broken(Letters):
        def take(self, id):
            raise RuntimeError("llguidance failed")

    run = Run()
    run.ask("broken", prompt_of(1, 10), GREEDY, Broken())
    run.ask("plain", prompt_of(2, 10))
    assert run.all()["plain"] == solo(prompt_of(2, 10))
    assert "llguidance" in str(run.found["broken"][-1])


def test_a_long_prompt_is_read_between_the_tokens_of_the_others():
    run = Run(context=4096)
    run.stepper.turns.tokens = 64
    run.ask("stream", prompt_of(1, 10), replace(GREEDY, max_new_tokens=60))
    for _ in range(3):
        run.turn()
    run.stepper._measure = lambda: None  # the budget stays
    run.ask("long", prompt_of(2, 1000))
    run.ask("long too", prompt_of(3, 1000))
    run.turn()
    run.ask("short", prompt_of(4, 30))
    before = len(run.found["stream"])
    read = run.model.read_tokens
    for turn in range(1, 5):
        run.turn()
        assert len(run.found["stream"]) == before + turn, "a token in every round"
        assert run.model.read_tokens - read <= 64 * (turn + 1)
    assert run.found["short"], "a short one does not wait for long ones"
    assert not run.found["long"] and not run.found["long too"]
    run.all()


def test_short_prompts_of_a_round_are_read_together():
    run = Run()
    for at in range(12):
        run.ask(at, prompt_of(at, 30))
    assert run.all() == {at: solo(prompt_of(at, 30)) for at in range(12)}
    assert run.model.together == 4, "128 tokens of a round: four whole prompts, and a fifth is not read in two parts"


def test_a_piece_that_nobody_waits_for_is_not_read():
    run = Run()
    for at in range(3):
        run.ask(at, prompt_of(at, 30))
    run.turn()
    run.open.pop(1).close()
    assert run.all()[2] == solo(prompt_of(2, 30)) and run.model.read_tokens == 60


def test_closing_in_the_middle_gives_everything_back():
    run = Run(kept=1)
    for at in range(12):
        run.ask(at, prompt_of(at, 100))
    for _ in range(4):
        run.turn()
    for events in run.open.values():
        with closing(events):
            pass
    assert not run.stepper._answers.busy and run.stepper.page_room._holding == [] and run.prefix._running == []
    run.prefix.clear()
    assert run.used_pages() == 0
