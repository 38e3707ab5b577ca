"""Guessed tokens among the answers of a GPU: who is guessed for, and that every answer stays what it is. Runs on any machine."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from paged_model import LazyModel, prompt_of
from test_running_answers import GREEDY, SAMPLED, Letters, Run, solo

from gptq_webui.gptq.cuda import answer_guesses
from gptq_webui.gptq.cuda.guessed_step import GuessedStep
from gptq_webui.gptq.cuda.kernel_arguments import ONE_ROWS, PAGE_TOKENS


class PagedGuesses(GuessedStep):
    """In the place of the GPU's, of a PagedModel."""

    def __init__(self, model):
        self._model, self._sequences = model, model.sequences
        model.step = model.step_rows
        self._host = torch.zeros(2, ONE_ROWS, dtype=torch.int32)
        self.asked, self.short_tokens = [], 0

    def relative_costs(self, one):
        return {2: 1.1, 4: 1.2, 8: 1.3}

    def step(self, position, guesses):
        self.asked.append(len(guesses))
        super().step(position, guesses)

    def _graph(self, rows):
        launch = getattr(self._model, "launch", lambda run: run())
        return SimpleNamespace(replay=lambda: launch(lambda: self._run(rows)))

    def _run(self, rows):
        model, s = self._model, self._sequences
        ids, positions = self._host.clone()
        s.ids[1:rows], s.positions[1:rows] = ids[1:rows], positions[1:rows]
        computed = [row for row in range(rows) if s.positions[row] >= 0]
        for row in computed:
            at = int(s.positions[row])
            model.tokens[int(s.table[0, at // PAGE_TOKENS]), at % PAGE_TOKENS] = int(s.ids[row])
        logits = [model._logits(0, int(s.positions[row])) for row in computed]
        row = 0
        while computed:
            s.logits[0] = logits[row]
            model.sample(0, 1)
            row += 1
            if row == rows or s.positions[row] < 0 or s.ids[0] != s.ids[row]:
                break
        s.positions[1:rows] = -1


class Oracle:
    """Guesses of an answer that is known, but for some."""

    matches = True

    def __init__(self, ids, answer, prompt, wrong, seed):
        self._ids, self._answer, self._prompt, self._wrong = list(ids), answer, prompt, wrong
        self._chance = random.Random(seed)

    def add(self, id):
        self._ids.append(id)

    def guess(self, costs, after=0):
        at, most = len(self._ids) - self._prompt, min(self._chance.randrange(8), len(costs) - 1)
        found = list(self._answer[at : at + after + most])
        return [id if self._chance.random() >= self._wrong else (id + 1) % 70 for id in found] if len(found) > after else []


def run_of(context=1024, pages=None, limit=256, kept=4, late=None):
    """`late`: the GPU computes when it is waited for, or by this chance earlier."""
    model = None if late is None else LazyModel(context, pages, seed=late)
    run = Run(context, pages, limit, kept, guesses=True, model=model)
    run.model.grow(ONE_ROWS)
    run.model.guessed = PagedGuesses(run.model)
    return run


def knows(monkeypatch, prompt, answer, wrong, seed=0):
    monkeypatch.setattr(answer_guesses, "Guesser", lambda ids: Oracle(ids, answer, len(prompt), wrong, seed))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [0, 0.2, 0.6, 1])
def test_an_answer_is_the_same_with_guesses_and_takes_fewer_steps(monkeypatch, params, wrong):
    for seed in range(6):
        prompt, params = prompt_of(seed, 50 + 9 * seed), replace(params, max_new_tokens=90, seed=seed)
        mine = solo(prompt, params)
        knows(monkeypatch, prompt, mine, wrong, seed)
        run = run_of()
        run.ask(0, prompt, params)
        assert run.all() == {0: mine}
        asked, plain = run.model.guessed.asked, len(run.model.rows_computed)
        assert asked
        if wrong == 0:
            assert len(asked) + plain < 50
        run.ask(1, prompt + mine[:70], params)  # what was computed too much is gone
        knows(monkeypatch, prompt + mine[:70], solo(prompt + mine[:70], params), wrong, seed)
        assert run.all()[1] == solo(prompt + mine[:70], params)
        run.prefix.clear()
        assert run.used_pages() == 0


def test_a_known_answer_is_found_by_the_prompt(monkeypatch):
    prompt = prompt_of(3, 30)
    mine = solo(prompt, replace(GREEDY, max_new_tokens=60))
    run = run_of()
    text = [*prompt, *mine, *prompt]  # another text, so another answer: whatever is guessed of the first one is wrong
    run.ask(0, text, replace(GREEDY, max_new_tokens=60))
    assert run.all()[0] == solo(text, replace(GREEDY, max_new_tokens=60))


def oracles(monkeypatch, known, wrong, chance):
    """Guesses by what each prompt's answer is."""
    monkeypatch.setattr(
        answer_guesses, "Guesser", lambda ids: Oracle(ids, known[tuple(ids)], len(ids), wrong, chance.randrange(1000))
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_conversations_are_the_same_with_guesses_on_a_gpu_that_is_late(monkeypatch, seed):
    """Some at a time, that one often runs alone; every kind of sampling, ends, cancels, closed streams and later turns."""
    chance = random.Random(seed)
    run = run_of(context=400, pages=(None, 10, 14)[seed % 3], limit=(256, 1, 8)[seed % 3], kept=chance.choice([1, 30]), late=seed)
    kinds = [GREEDY, SAMPLED, SAMPLED, replace(SAMPLED, logprobs=1), replace(GREEDY, dry_multiplier=0.5)]
    known, asked, cancels, closed, texts = {}, {}, {}, set(), [prompt_of(900, 70)]
    oracles(monkeypatch, known, (0, 0.1, 0.5)[seed // 3 % 3], chance)
    for at in range(14):
        ids = (chance.choice([[], *texts]) + prompt_of(seed * 50 + at, chance.randrange(1, 90)))[:330]
        params = replace(chance.choice(kinds), seed=at, max_new_tokens=chance.randrange(1, 110))
        mask, ends = Letters if chance.random() < 0.1 else None, chance.choice([(), (3, 41), range(20, 24)])
        known[tuple(ids)] = solo_in(400, ids, params, mask)
        asked[at] = alone = solo_in(400, ids, params, mask, ends)
        cancels[at] = run.ask(at, ids, params, mask and mask(), ends)
        texts.append((ids + alone)[:250])  # a later turn
        for _ in range(chance.choice([0, 2, 10, 60, 120])):
            if run.stepper.parallel == 1:  # the worker lets one answer at a time in
                run.turn_of(min(run.open, default=None))
            else:
                run.turn()
        if chance.random() < 0.15:
            cancels[chance.choice(list(cancels))].set()
        if chance.random() < 0.1 and run.open:
            closed.add(name := chance.choice(list(run.open)))
            run.open.pop(name).close()
    while run.stepper.parallel == 1 and run.open:
        run.turn_of(min(run.open))
    for at, ids in run.all().items():
        assert not any(isinstance(each, Exception) for each in run.found[at]), at
        assert ids == (asked[at][: len(ids)] if at in closed or cancels[at].is_set() else asked[at]), at
    assert run.model.guessed.asked, "nothing was guessed"
    room = run.stepper.page_room
    assert not run.stepper._answers.busy and not room._holding and not room._waiting
    run.prefix.clear()
    run.stepper._answers.close()
    assert run.used_pages() == 0 and not run.model.pages._users


def solo_in(context, ids, params, mask, ends=()):
    run = Run(context)
    run.ask(0, ids, params, mask and mask(), ends)
    return run.all()[0]


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_that_repeats_itself_is_guessed_from_it(seed):
    """The guesses of guessing.py; a bias makes the model say one word again and again, and the GPU is late."""
    run = run_of(late=seed)
    run.ask(0, [7] * 20, replace(GREEDY, logit_bias=((7, 100.0),), max_new_tokens=100))
    assert run.all()[0] == [7] * 100
    assert run.model.guessed.asked and len(run.model.guessed.asked) + len(run.model.rows_computed) < 40


@pytest.mark.parametrize("seed", range(8))
def test_others_join_and_leave_while_tokens_are_guessed(monkeypatch, seed):
    prompts = [prompt_of(at, 40 + 30 * at) for at in range(4)]
    asked = [replace(SAMPLED if at % 2 else GREEDY, max_new_tokens=60 + 10 * at, seed=at) for at in range(4)]
    alone = [solo(*each) for each in zip(prompts, asked, strict=True)]
    chance = random.Random(seed)
    answers = {len(prompt): answer for prompt, answer in zip(prompts, alone, strict=True)}

    def guesser(ids):
        length = next(each for each in answers if len(ids) == each)
        return Oracle(ids, answers[length], length, 0.2, chance.randrange(100))

    monkeypatch.setattr(answer_guesses, "Guesser", guesser)
    run = run_of()
    run.ask(0, prompts[0], asked[0])
    for at in range(1, 4):
        for _ in range(chance.randrange(1, 40)):
            run.turn()
        cancel = run.ask(at, prompts[at], asked[at])
        if at == 2:
            for _ in range(chance.randrange(1, 20)):
                run.turn()
            cancel.set()
    found = run.all()
    assert run.model.guessed.asked
    for at in range(4):
        assert found[at] == (alone[at][: len(found[at])] if at == 2 else alone[at]), at
    run.prefix.clear()
    assert run.used_pages() == 0 and not run.stepper._answers.busy


def test_guesses_end_with_the_context_and_where_there_are_no_pages(monkeypatch):
    prompt = prompt_of(1, 110)
    mine = solo(prompt, replace(GREEDY, max_new_tokens=200))
    knows(monkeypatch, prompt, mine, 0)
    full = run_of(context=128)
    full.ask(0, prompt, replace(GREEDY, max_new_tokens=200))
    assert full.all()[0] == mine[:18]
    scarce = run_of(pages=3)
    scarce.ask(0, prompt, replace(GREEDY, max_new_tokens=80))
    assert scarce.all()[0] == mine[:80]


def test_answers_that_need_the_host_are_not_guessed_for(monkeypatch):
    prompt = prompt_of(5, 40)
    for params, mask in ((replace(GREEDY, logprobs=2), None), (GREEDY, Letters)):
        knows(monkeypatch, prompt, [0] * 40, 0)
        run = run_of()
        run.ask(0, prompt, params, mask and mask())
        if mask:
            assert run.all()[0] == solo(prompt, params, mask())
        else:
            run.all()
        assert run.model.guessed.asked == []


def test_a_short_answer_alone_is_faster_so_its_guesses_cost_more():
    guessed, shape = SimpleNamespace(short_tokens=3072), SimpleNamespace(context_tokens=8192)
    guesses = answer_guesses.AnswerGuesses(SimpleNamespace(guessed=guessed, shape=shape))
    products = {2: 1.1, 4: 1.2, 8: 1.3}

    def costs(tokens):
        return guesses._costs(products, SimpleNamespace(memory=SimpleNamespace(length=tokens)))

    short, long = costs(3071), costs(3072)
    assert all(1.04 < a / b < 1.05 for a, b in zip(short[1:], long[1:], strict=True)) and short[0] == long[0] == 1
    guessed.short_tokens = 0
    assert costs(3071)[1] == pytest.approx(long[1], rel=1e-3)
