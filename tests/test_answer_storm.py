"""Many answers of every kind at once, drawn by a seed: each is what it is alone, and nothing is left of them. Any machine."""

import random
import threading
from dataclasses import replace

import pytest
from paged_model import prompt_of
from test_running_answers import GREEDY, SAMPLED, Letters, Run, solo

from gptq_webui.core.chat import Step
from gptq_webui.gptq.prompt_scores import embed, score


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_answers_is_what_each_is_alone(seed):
    """Few pages, few rows, common beginnings, every kind of sampling, cancels and closed streams; drawn by a seed."""
    draw = random.Random(seed)
    run = Run(pages=(12, 24, None)[seed], limit=draw.choice([8, 256]), kept=draw.choice([1, 30]))
    kinds = [GREEDY, SAMPLED, replace(SAMPLED, logprobs=1), replace(GREEDY, dry_multiplier=0.5)]
    systems = [prompt_of(1000 + at, length) for at, length in enumerate((64, 130, 256))]
    asked, cancels, closed = {}, {}, set()
    for at in range(25):
        ids = (draw.choice([[], *systems]) + prompt_of(seed * 100 + at, draw.randrange(1, 200)))[:450]
        params = replace(draw.choice(kinds), seed=at, max_new_tokens=draw.randrange(1, 120))
        asked[at] = ids, params, draw.random() < 0.2
        cancels[at] = run.ask(at, ids, params, Letters() if asked[at][2] else None)
        for _ in range(draw.choice([0, 1, 5])):
            run.turn()
        if draw.random() < 0.1:
            cancels[draw.choice(list(cancels))].set()
        if draw.random() < 0.1 and run.open:
            closed.add(name := draw.choice(list(run.open)))
            run.open.pop(name).close()
    for at, ids in run.all().items():
        alone = solo(*asked[at][:2], Letters() if asked[at][2] else None)
        assert ids == (alone[: len(ids)] if at in closed or cancels[at].is_set() else alone), at
        assert not any(isinstance(each, Exception) for each in run.found[at]), at
    room = run.stepper.page_room
    assert not run.stepper._answers.busy and not room._holding and not room._waiting and not run.stepper.turns._waiting
    run.prefix.clear()
    run.stepper._answers.close()
    assert run.used_pages() == 0 and not run.model.pages._users


def scored(events):
    return [(each.id, each.logprob, each.top) for each in events if isinstance(each, Step)]


@pytest.mark.parametrize("pages", [None, 16])
def test_texts_are_scored_and_embedded_beside_answers(pages):
    """With 16 pages the youngest, which reads a text, gives up its own and reads them again."""
    texts = {at: prompt_of(50 + at, 300 + 20 * at) for at in range(2)}
    cancel = threading.Event()
    alone = {at: scored(score(Run().stepper, ids, 2, cancel)) for at, ids in texts.items()}
    (vector,) = (each for each in embedded(Run().stepper, texts[0]) if each)
    run, wanted = Run(pages=pages), {}
    for at in range(6):
        ids, params = prompt_of(at, 60 + 10 * at), replace(SAMPLED, seed=at, max_new_tokens=100)
        wanted[at] = solo(ids, params)
        run.ask(at, ids, params)
        run.turn()
    for at, ids in texts.items():
        run.open["text", at], run.found["text", at] = score(run.stepper, ids, 2, cancel), []
    run.open["vector"], run.found["vector"] = embedded(run.stepper, texts[0]), []
    found = run.all()
    assert {at: found[at] for at in wanted} == wanted
    assert all(scored(run.found["text", at]) == alone[at] for at in texts)
    assert run.found["vector"][0] == pytest.approx(vector, abs=1e-6)


def embedded(stepper, ids):
    """The vector last; before it None, as the worker passes it on."""
    yield (yield from embed(stepper, ids, "mean", threading.Event()))
