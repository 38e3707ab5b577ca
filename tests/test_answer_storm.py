"""Many answers of every kind at once, drawn by a seed: each is what it is alone, and nothing is left of them. Any machine."""

import random
from dataclasses import replace

import pytest
from paged_model import prompt_of
from test_running_answers import GREEDY, SAMPLED, Letters, Run, solo


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
