"""gptq/sampling_loop.py: `generate` of a model with the compiled step calls processors, criteria and streamers as before."""

import pytest
import torch

pytest.importorskip("numba")

from test_patched_forward import CACHE, OTHER, PROMPT, Ban, Model, generate
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptq_webui.gptq import sampling_loop
from gptq_webui.gptq.sampling_loop import SamplingLoop

REPEATED = torch.tensor([[0, *[50, 51, 52, 53, 54, 55] * 4, 50, 51]])


@pytest.fixture(scope="module", params=["cpu", "graph"])
def model(request):
    model = Model(kernel=request.param)
    yield model
    model.stepper.close()


@pytest.fixture
def loops(monkeypatch):
    """How many tokens the loop chose, one number for each call of `generate` that went through it."""
    found = []
    run = SamplingLoop.run

    def counted(self, *given):
        found.append(0)
        ids = run(self, *given)
        found[-1] = ids.shape[1] - given[0].shape[1]
        return ids

    monkeypatch.setattr(SamplingLoop, "run", counted)
    return found


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


class Look:
    """A stopping criterion that keeps what it was called with, and ends the answer after some tokens."""

    def __init__(self, most=99):
        self.seen, self.most = [], most

    def __call__(self, input_ids, scores, **given):
        self.seen.append((input_ids.tolist(), scores, given))
        return torch.full((input_ids.shape[0],), len(self.seen) >= self.most, dtype=torch.bool)


@pytest.mark.parametrize("ids", [PROMPT, OTHER, REPEATED], ids=["prompt", "other", "repeated"])
@pytest.mark.parametrize("settings", [
    {},
    {"use_cache": False},
    {"suppress_tokens": [7, 60, 5000, 51]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
    {"min_new_tokens": 12, "eos_token_id": [*range(3, 200), 5000]},
    {"min_length": 20, "eos_token_id": [*range(3, 200)]},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
], ids=str)  # fmt: skip
def test_tokens_are_the_twins_and_no_forward_of_transformers_is_called(model, loops, ids, settings):
    found = []
    for hf in (model.hf, model.twin):
        torch.manual_seed(5)
        found.append(generate(hf, ids, 40, **settings).tolist())
    assert found[0] == found[1] and loops == [len(found[0][0]) - ids.shape[1]] and model.own_calls == 0


def by_both(processors, scores):
    """What transformers' processors make of the scores, and what is called in their place."""
    found = []
    for each in (processors, sampling_loop._processors(processors)):
        own = scores.clone()
        for processor in each:
            own = processor(None, own)
        found.append(own)
    return found


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("top_k", [1, 7, 40, 999, 5000])
def test_top_k_with_top_p_leaves_the_tokens_that_both_leave(top_k, top_p, least):
    torch.manual_seed(top_k)
    pair = [TopKLogitsWarper(top_k, min_tokens_to_keep=least), TopPLogitsWarper(top_p, min_tokens_to_keep=least)]
    assert len(sampling_loop._processors([TemperatureLogitsWarper(0.7), *pair, MinPLogitsWarper(0.1)])) == 3
    for spread in (0.1, 1.0, 8.0):
        scores = torch.randn(1, 1000) * spread
        scores[:, 5:9] = -torch.inf
        wanted, found = by_both(pair, scores)
        assert torch.equal(wanted, found), spread


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_k_with_top_p_of_equal_scores_leaves_as_many_tokens_as_both_leave(top_p):
    torch.manual_seed(3)
    for steps in (2, 4, 16):  # of each unit
        scores = torch.round(torch.randn(1, 200) * 2 * steps) / steps
        wanted, found = by_both([TopKLogitsWarper(20), TopPLogitsWarper(top_p)], scores)
        assert torch.equal(wanted.sort().values, found.sort().values)
        assert bool(((found == scores) | found.isneginf()).all())


def test_what_is_no_usual_top_k_and_top_p_is_called_as_it_is():
    class Own(TopPLogitsWarper):
        pass

    for pair in (
        [TopKLogitsWarper(5), Own(0.5)],
        [TopPLogitsWarper(0.5), TopKLogitsWarper(5)],
        [TopKLogitsWarper(5, filter_value=-100.0), TopPLogitsWarper(0.5)],
        [TopKLogitsWarper(5), TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.5)],
    ):
        assert sampling_loop._processors(pair) == pair
    scores = torch.full((1, 50), torch.nan)
    assert bool(by_both([TopKLogitsWarper(5), TopPLogitsWarper(0.5)], scores)[1].softmax(-1).isnan().all()), "Draw sees it"


def test_every_processor_criterion_and_streamer_gets_what_it_got_before(model, loops):
    seen = []
    for hf in (model.hf, model.twin):
        streamer, look, before = Streamer(), Look(9), []

        def note(ids, scores, before=before):
            before.append((ids.tolist(), scores.dtype, scores.is_inference()))
            scores[:, 60] = -float("inf")  # in place, as some do
            return scores

        processors = LogitsProcessorList([Ban(), note])
        ids = generate(
            hf, PROMPT, 40, logits_processor=processors, stopping_criteria=StoppingCriteriaList([look]), streamer=streamer
        )
        seen.append((ids.tolist(), streamer.got, look.seen, before))
    assert seen[0] == seen[1] and loops == [9]
    assert len(seen[0][2]) == 9 and seen[0][1][-1] == "end"


def test_an_end_token_ends_it_and_other_criteria_still_hear_of_it(model, loops):
    end = generate(model.twin, PROMPT, 5)[0, -1].item()
    looks = [Look(), Look()]
    found = [generate(hf, PROMPT, 40, eos_token_id=[end], stopping_criteria=StoppingCriteriaList([look])).tolist()
             for hf, look in zip((model.hf, model.twin), looks, strict=True)]  # fmt: skip
    assert found[0] == found[1] and found[0][0][-1] == end
    assert looks[0].seen == looks[1].seen and loops == [len(looks[0].seen)]


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "streamer"])
def test_what_a_callers_part_raises_comes_to_the_caller_and_the_next_answer_is_right(model, where):
    class Stop(Exception):
        pass

    def fail(*_given, **_more):
        raise Stop

    part = Streamer() if where == "streamer" else [fail]
    if where == "streamer":
        part.end = fail
    with pytest.raises(Stop):
        generate(model.hf, PROMPT, 8, **{where: part})
    assert type(model.hf) is type(model.twin)
    model.same(ids=PROMPT)


def test_a_cache_of_the_caller_holds_the_answer_and_goes_on(model, loops):
    name = "cache" if "cache" in model.hf.forward.__signature__.parameters else "past_key_values"
    found = []
    for hf in (model.hf, model.twin):
        cache = DynamicCache()
        first = generate(hf, PROMPT, 6, **{name: cache})
        length = cache.get_seq_length()
        found.append((first.tolist(), length, generate(hf, torch.cat([first, OTHER], 1), 6, **{name: cache}).tolist()))
    assert found[0] == found[1] and found[0][1] == PROMPT.shape[1] + 5
    assert loops == [6]  # what goes on from a filled cache goes the usual way


def test_hooks_and_a_replaced_forward_of_the_model_are_called_for_every_token(model, loops):
    seen = []
    hook = model.hf.register_forward_hook(lambda *_: seen.append("hook"))
    model.same(count=4)
    hook.remove()
    before = model.hf.forward

    def forward(*positional, **given):
        seen.append("forward")
        return before(*positional, **given)

    forward.__signature__ = before.__signature__
    model.hf.forward = forward
    model.same(count=4)
    model.hf.forward = before
    assert seen == ["hook"] * 4 + ["forward"] * 4 and loops == []
    model.same(count=4)
    assert loops == [4]


def test_guesses_are_computed_beside_the_last_token(model, loops):
    if model.stepper.kernel != "cpu":
        pytest.skip("a graph computes one token")
    passes = []
    rows_logits = model.stepper.rows_logits

    def counted(pieces):
        passes.append(sum(len(ids) for _memory, ids in pieces))
        return rows_logits(pieces)

    model.stepper._batch._compute = counted
    try:
        model.same(ids=REPEATED, count=60)
        assert loops == [60] and len(passes) < 59 and max(passes) > 1
    finally:
        model.stepper._batch._compute = rows_logits


def test_the_conversation_is_kept_for_the_next_one(model):
    model.prefix.clear()
    answer = model.same(count=20)
    held, length = model.prefix.take([*answer[0].tolist(), 70, 71])
    assert length == answer.shape[1] - 1 and held.length == length


def test_what_asks_for_more_than_tokens_goes_the_usual_way(model, loops):
    for settings in (
        {"return_dict_in_generate": True}, {"prefill_chunk_size": 4}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3},
    ):  # fmt: skip
        generate(model.hf, PROMPT, 4, **settings)
    assert loops == []


def test_a_text_that_would_be_longer_than_the_step_computes_goes_the_usual_way(loops):
    model = Model(context_tokens=32)
    model.same(count=60, own_calls=None)
    model.same(count=10)
    assert loops == [10]
    model.stepper.close()


@pytest.mark.parametrize("cut", [1, 3, 10])
@pytest.mark.parametrize("nested", ["forward", "generate"])
def test_a_processor_may_call_the_same_model_with_another_text(model, loops, nested, cut):
    prompt = torch.tensor([[0, *[(at * 37) % 250 + 3 for at in range(60)]]])

    def asks(hf):
        def process(ids, scores):
            other = torch.cat([ids[:, :-cut], torch.tensor([[9, 8, 7, 11, 12]])], dim=1)
            with torch.no_grad():
                if nested == "generate":
                    return scores + 0.5 * hf(input_ids=generate(hf, other, 3)).logits[:, -1]
                return scores + 0.5 * hf(input_ids=other).logits[:, -1]

        return LogitsProcessorList([process])

    found = [generate(hf, prompt, 12, logits_processor=asks(hf)).tolist() for hf in (model.hf, model.twin)]
    assert found[0] == found[1] and 12 in loops
    assert generate(model.hf, prompt, 12).tolist() == generate(model.twin, prompt, 12).tolist()


def test_guidance_by_a_negative_prompt_leaves_the_callers_cache_its_own_ids(model):
    found = []
    for hf in (model.hf, model.twin):
        cache = DynamicCache()
        first = generate(hf, PROMPT, 6, guidance_scale=1.7, negative_prompt_ids=OTHER, **{CACHE: cache})
        held = cache.get_seq_length()
        found.append((first.tolist(), held, generate(hf, torch.cat([first, OTHER], 1), 6, **{CACHE: cache}).tolist()))
    assert found[0] == found[1]
