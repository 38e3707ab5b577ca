"""gptq/generation.py, prefix_cache.py and stepper.py: the loop from prompt to tokens on a tiny real model."""

import threading
from typing import ClassVar

import pytest
import torch

import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache

GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=12)


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def model(request):
    return tiny.dense_model(request.param)


def run(model, ids, params=GREEDY, cancel=None, prefix=None, end_ids=(), context_tokens=200):
    cancel, prefix = cancel or threading.Event(), prefix or PrefixCache()
    events = list(generate(model, ids, params, cancel, prefix=prefix, end_ids=end_ids, context_tokens=context_tokens))
    assert isinstance(events[-1], Finish)
    return [event.id for event in events[:-1]], events[-1]


def by_transformers(model, ids, count):
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_are_those_of_transformers_generate(model):
    ids = list(range(5, 30))
    found, finish = run(model, ids)
    assert found == by_transformers(model, ids, 12)
    assert finish.reason == "length" and finish.prompt_tokens == 25 and finish.cached_tokens == 0


def test_a_grammar_is_asked_before_every_token_and_ends_the_answer(model):
    class Odd:
        """Odd ids only, four of them."""

        taken: ClassVar[list] = []

        def allowed(self, size):
            return torch.arange(size) % 2 == 1

        def take(self, id):
            self.taken.append(id)

        complete = property(lambda self: len(self.taken) == 4)

    mask, cancel = Odd(), threading.Event()
    ask = {"prefix": PrefixCache(), "end_ids": (), "context_tokens": 200, "grammar_mask": mask}
    events = list(generate(model, list(range(5, 30)), GREEDY, cancel, **ask))
    assert [each.id for each in events[:-1]] == mask.taken and len(mask.taken) == 4
    assert all(id % 2 for id in mask.taken) and events[-1].reason == "stop"


def test_a_prompt_in_chunks_gives_the_same_tokens(model, monkeypatch):
    ids = list(range(5, 40))
    whole, _ = run(model, ids)
    monkeypatch.setattr("gptq_webui.gptq.stepper.Stepper.chunk_tokens", 7)
    assert run(model, ids)[0] == whole


def test_a_second_turn_computes_only_what_is_new(model):
    prefix = PrefixCache()
    ids = list(range(5, 30))
    first, _ = run(model, ids, prefix=prefix)
    longer = [*ids, *first, 60, 61, 62]
    found, finish = run(model, longer, prefix=prefix)
    assert finish.cached_tokens == len(ids) + len(first) - 1  # the last token was never put through the model
    assert found == run(model, longer)[0]


def test_an_edited_turn_is_computed_from_the_first_difference(model):
    prefix = PrefixCache()
    run(model, list(range(5, 30)), prefix=prefix)
    edited = [*range(5, 20), 77, 78, 79]
    found, finish = run(model, edited, prefix=prefix)
    assert finish.cached_tokens == 15
    assert found == run(model, edited)[0]


def test_the_same_prompt_again_leaves_one_token_to_compute(model):
    prefix = PrefixCache()
    ids = list(range(5, 30))
    first, _ = run(model, ids, prefix=prefix)
    again, finish = run(model, ids, prefix=prefix)
    assert again == first and finish.cached_tokens == len(ids) - 1


def test_another_conversation_does_not_push_the_first_out(model):
    prefix = PrefixCache()
    ids, other = list(range(5, 30)), [*range(5, 9), *range(100, 120)]
    first, _ = run(model, ids, prefix=prefix)
    assert run(model, other, prefix=prefix)[1].cached_tokens == 4  # the beginning they share is copied
    found, finish = run(model, [*ids, *first, 60], prefix=prefix)
    assert finish.cached_tokens == len(ids) + len(first) - 1
    assert found == run(model, [*ids, *first, 60])[0]


def test_the_oldest_conversations_go_when_there_are_too_many_or_they_are_too_large(model):
    for prefix in (PrefixCache(conversations=2), PrefixCache(size_bytes=1)):
        for start in (5, 100, 200):
            run(model, list(range(start, start + 20)), prefix=prefix)
        assert run(model, list(range(5, 25)), prefix=prefix)[1].cached_tokens == 0
        assert run(model, list(range(5, 25)), prefix=prefix)[1].cached_tokens == 19  # the last one stays in any case


def test_cancel_is_heard_between_the_chunks_of_a_long_prompt(model, monkeypatch):
    monkeypatch.setattr("gptq_webui.gptq.stepper.Stepper.chunk_tokens", 7)
    cancel, read = threading.Event(), []
    prefix = PrefixCache()

    def progress(tokens):
        read.append(tokens)
        cancel.set()

    ids = list(range(5, 40))
    events = list(generate(model, ids, GREEDY, cancel, prefix=prefix, end_ids=(), context_tokens=200, progress=progress))
    assert [event.reason for event in events] == ["cancelled"] and read == [7]
    assert run(model, ids, prefix=prefix)[1].cached_tokens == 7  # what was read is not lost


def test_log_probabilities_are_those_of_the_models_own_distribution(model):
    params = GenerationParams(temperature=0.5, repetition_penalty=1.5, logit_bias={9: 5.0}, logprobs=3, seed=2, max_new_tokens=5)
    events = list(generate(model, [5, 6, 7], params, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=200))
    ids = [5, 6, 7]
    for step in events[:-1]:
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert abs(step.logprob - float(wanted[step.id])) < 1e-3
        assert [id for id, _ in step.top] == wanted.topk(3).indices.tolist()
        assert all(abs(value - float(wanted[id])) < 1e-3 for id, value in step.top)
        ids.append(step.id)


def test_log_probabilities_are_left_out_unless_asked_for(model):
    events = list(generate(model, [5, 6], GREEDY, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=200))
    assert all(step.logprob is None and step.top == () for step in events[:-1])


def test_cancel_ends_within_one_token(model):
    cancel = threading.Event()
    events = generate(model, [1, 2, 3], GREEDY, cancel, prefix=PrefixCache(), end_ids=(), context_tokens=200)
    assert isinstance(next(events), Step)
    cancel.set()
    assert [type(event) for event in events] in ([Finish], [Step, Finish])


def test_the_end_token_ends_and_is_left_out(model):
    found, _ = run(model, [5, 6, 7])
    ended, finish = run(model, [5, 6, 7], end_ids={found[3]})
    assert ended == found[: found.index(found[3])] and finish.reason == "stop"


def test_the_context_is_never_overrun(model):
    found, finish = run(model, list(range(10)), context_tokens=15)
    assert len(found) == 5 and finish.reason == "length"


def test_nothing_of_inference_mode_leaks_into_the_reader(model):
    events = generate(model, [1, 2, 3], GREEDY, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=200)
    list(events)
    assert not torch.is_inference_mode_enabled()


def test_the_same_seed_draws_the_same_tokens(model):
    params = GenerationParams(seed=7, temperature=1.5, max_new_tokens=20)
    assert run(model, [5, 6, 7], params)[0] == run(model, [5, 6, 7], params)[0]
    other = GenerationParams(seed=8, temperature=1.5, max_new_tokens=20)
    assert run(model, [5, 6, 7], params)[0] != run(model, [5, 6, 7], other)[0]
