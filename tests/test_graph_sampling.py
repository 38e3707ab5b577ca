"""Answers of a recorded forward, sampled on the GPU (emulated_gpu.py): what is computed ahead, and who needs the host."""

import threading
from dataclasses import replace

import pytest
import torch
from test_cuda_every_architecture import NEW, in_turns
from test_graph_answers import CONTEXT, GREEDY, PROMPTS, SEEDED, alone, answer, folders, stepper_of
from test_running_answers import Letters

from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.errors import BadParameter
from gptq_webui.gptq import generation, graph_step, graph_stepper, sampling
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.transformers_stepper import TransformersStepper

pytestmark = NEW
__all__ = ["folders", "stepper_of"]
BY_TORCH = {
    "dry": replace(SEEDED, dry_multiplier=0.8, dry_allowed_length=1),
    "xtc": replace(SEEDED, xtc_probability=0.5, xtc_threshold=0.05),
    "least": replace(SEEDED, min_tokens=4),
    "dynamic": replace(SEEDED, dynatemp_range=0.3),
}


@pytest.fixture
def log(stepper_of, monkeypatch):
    """(stepper, what it launches and what the host waits for, in order)."""
    stepper, said = stepper_of(), []
    compute, mark = stepper._step._compute, graph_step.Passed
    monkeypatch.setattr(stepper._step, "_compute", lambda rows: said.append(f"step {len(rows)}") or compute(rows))

    class Noted(mark):
        def synchronize(self):
            said.append("wait")

    monkeypatch.setattr(graph_step, "Passed", Noted)
    return stepper, said


def behind(said):
    """How many steps the host has not waited for, at each wait."""
    launched, found = 0, []
    for each in said:
        launched += each != "wait"
        if each == "wait":
            found.append(launched - len(found))
    return found


def by_grammar(stepper, ids, params=GREEDY):
    cancel, mask = threading.Event(), Letters()
    return generation.generate(
        stepper, ids, params, cancel, prefix=PrefixCache(), end_ids=(), context_tokens=CONTEXT, grammar_mask=mask
    )


def test_the_next_step_is_launched_before_the_host_waits_for_a_token(log):
    stepper, said = log
    long = replace(GREEDY, max_new_tokens=30)
    wanted = alone(stepper, PROMPTS[0], long), alone(stepper, PROMPTS[1])
    assert all(each >= 1 for each in behind(said[: said.index("wait") + 30])), "an answer that is alone"
    said.clear()
    assert tuple(in_turns([answer(stepper, PROMPTS[0], long), answer(stepper, PROMPTS[1])], joins=(1, 10))) == wanted
    first = said.index("step 2")
    assert said.count("step 2") >= 6 and "step 1" in said[:first] and said[-2:].count("step 1") <= 1
    waits = "".join({"wait": "w", "step 1": "1", "step 2": "2"}[each] for each in said)
    assert "ww" not in waits[2:-2].replace("w2w", ""), "a step is launched between two waits, but for a first token"


def test_answers_that_torch_samples_are_beside_others_what_each_is_alone(stepper_of):
    stepper = stepper_of()
    params = [BY_TORCH["dry"], SEEDED, BY_TORCH["xtc"], GREEDY]
    wanted = [alone(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)]
    assert (
        in_turns([answer(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)], joins=(1, 1, 3, 4)) == wanted
    )
    params = [BY_TORCH["least"], BY_TORCH["dynamic"], replace(SEEDED, logprobs=1)]
    wanted = [alone(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)]
    assert in_turns([answer(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)]) == wanted


def test_torch_samples_only_what_the_kernel_does_not(stepper_of, monkeypatch):
    stepper, asked = stepper_of(), []
    call = sampling.Sampler.__call__
    monkeypatch.setattr(sampling.Sampler, "__call__", lambda self, *given: asked.append(self._params) or call(self, *given))
    in_turns([answer(stepper, ids, each) for ids, each in zip(PROMPTS, (BY_TORCH["dry"], SEEDED, GREEDY), strict=False)])
    assert len(asked) == 8 and set(asked) == {BY_TORCH["dry"]}


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_grammars_beside_others(stepper_of, params):
    stepper = stepper_of()
    tokens = [each.id for each in by_grammar(stepper, PROMPTS[0], params) if isinstance(each, Step)]
    others = [alone(stepper, ids, params) for ids in PROMPTS[1:3]]
    assert tokens == sorted(set(tokens))
    running = [by_grammar(stepper, PROMPTS[0], params), *(answer(stepper, ids, params) for ids in PROMPTS[1:3])]
    assert in_turns(running, joins=(2, 1, 1)) == [tokens, *others]


def test_the_last_of_several_moves_into_the_first_row_and_goes_on(stepper_of):
    stepper = stepper_of()
    lengths = (4, 5, 6, 30)
    params = [replace(SEEDED, repetition_range=6, presence_penalty=0.5, max_new_tokens=each) for each in lengths]
    wanted = [alone(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)]
    assert in_turns([answer(stepper, ids, each) for ids, each in zip(PROMPTS, params, strict=False)]) == wanted
    assert not stepper._step.sequences.memories and not stepper._answers.busy


def test_an_answer_fills_its_context_and_ends(stepper_of):
    stepper, long = stepper_of(), replace(GREEDY, max_new_tokens=4 * CONTEXT)
    events = [each for each in answer(stepper, PROMPTS[0], long) if each is not None]
    tokens = [each.id for each in events[:-1]]
    assert len(tokens) == CONTEXT - len(PROMPTS[0]) and isinstance(events[-1], Finish)
    beside = in_turns([answer(stepper, ids, long) for ids in PROMPTS[:2]])
    assert (
        beside[0][:40] == tokens[:40]
        and [len(each) + len(ids) for each, ids in zip(beside, PROMPTS, strict=False)] == [CONTEXT] * 2
    )


def test_a_token_without_a_row_in_the_embedding_ends_its_answer_only(stepper_of, monkeypatch):
    plain = stepper_of()
    whole = [alone(plain, ids) for ids in PROMPTS[:3]]
    known = max(whole[0])  # the first id that has none
    make = TransformersStepper.__init__

    def with_fewer(self, *given, **how):
        make(self, *given, **how)
        self.embedding_rows = known

    monkeypatch.setattr(TransformersStepper, "__init__", with_fewer)
    stepper = stepper_of()
    assert stepper.parallel == 4
    answers = [answer(stepper, ids) for ids in PROMPTS[:3]]
    found, failed = [[], [], []], set()
    for _turn in range(40):
        for at, each in enumerate(answers):
            try:
                event = next(each, None)
            except BadParameter:
                failed.add(at)
                continue
            if isinstance(event, Step):
                found[at].append(event.id)
    for at, (mine, tokens) in enumerate(zip(found, whole, strict=True)):
        over = next((at for at, id in enumerate(tokens) if id >= known), None)
        assert (at in failed) == (over is not None and over < len(tokens) - 1)
        assert mine == tokens[: len(tokens) if over is None else over + 1]
    assert 0 in failed or whole[0].index(known) == len(whole[0]) - 1


def test_one_answer_at_a_time_has_the_same_seed_s_tokens(stepper_of):
    several, one = stepper_of(), stepper_of(parallel=1)
    assert one.parallel == 1 and one._step.sequences.rows == 1
    assert [alone(one, ids, SEEDED) for ids in PROMPTS[:2]] == [alone(several, ids, SEEDED) for ids in PROMPTS[:2]]


def test_models_that_keep_states_are_sampled_by_torch(stepper_of):
    stepper = stepper_of("mamba2")
    assert stepper._answers is None and len(alone(stepper, PROMPTS[0], SEEDED)) == 8
    with torch.inference_mode():
        stepper.close()


def recordings(monkeypatch, stepper, said):
    """Note what is recorded."""
    one, rows = stepper._recorder.record, stepper._rows._recorder.record
    monkeypatch.setattr(stepper._recorder, "record", lambda run: said.append("record") or one(run))
    monkeypatch.setattr(stepper._rows._recorder, "record", lambda run: said.append("record rows") or rows(run))


def events_of(stepper, ids, params, said):
    for event in answer(stepper, ids, params):
        said += [type(event).__name__] * (event is not None)


def test_a_first_token_waits_for_no_recording(log, monkeypatch):
    monkeypatch.setattr(graph_stepper, "FIRST_CAPACITY", 16)
    stepper, said = log
    stepper._room = None  # a conversation that is longer than the room
    recordings(monkeypatch, stepper, said)
    events_of(stepper, PROMPTS[0] * 3, replace(GREEDY, max_new_tokens=4), said)
    assert said[:2] == ["wait", "Step"] and said.count("record") == 1
    stepper._answers.close()
    said.clear()
    events_of(stepper, PROMPTS[0] * 3, replace(GREEDY, max_new_tokens=4), said)
    assert said[:3] == ["step 1", "wait", "Step"] and "record" not in said, "what is recorded runs meanwhile"


def test_a_step_that_nobody_wants_is_not_computed_beside_the_only_token(log, monkeypatch):
    stepper, said = log
    recordings(monkeypatch, stepper, said)
    for ids in PROMPTS[:3]:
        events_of(stepper, ids, replace(GREEDY, max_new_tokens=1), said)
    assert said == ["wait", "Step", "Finish"] * 3
