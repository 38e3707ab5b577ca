"""gptq/decode.py, kv.py and sampling.py: the loop from prompt to tokens on a tiny real model."""

import threading

import pytest
import torch

import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.decode import generate
from gptq_webui.gptq.kv import PrefixCache
from gptq_webui.gptq.sampling import Sampler

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


def test_a_prompt_in_chunks_gives_the_same_tokens(model, monkeypatch):
    ids = list(range(5, 40))
    whole, _ = run(model, ids)
    monkeypatch.setattr("gptq_webui.gptq.decode._CHUNK_TOKENS", 7)
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


def draws(params, logits, count=4000):
    sampler = Sampler(params, torch.device("cpu"))
    ids = torch.tensor([[0]])
    return torch.bincount(torch.cat([sampler(logits, ids) for _ in range(count)]).flatten(), minlength=logits.shape[-1]) / count


def test_samples_follow_the_tempered_distribution():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0, -1.0]])
    found = draws(GenerationParams(temperature=0.8, top_k=0, top_p=1, repetition_penalty=1, seed=1), logits)
    wanted = (logits[0] / 0.8).softmax(-1)
    assert (found - wanted).abs().max() < 0.03


@pytest.mark.parametrize(
    ("limits", "kept"), [({"top_k": 2}, {1, 2}), ({"top_p": 0.6}, {2}), ({"min_p": 0.2}, {1, 2})], ids=["top_k", "top_p", "min_p"]
)
def test_unlikely_tokens_are_never_drawn(limits, kept):
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0, -1.0]])
    params = GenerationParams(**{"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1, **limits})
    found = draws(params, logits, 500)
    assert set(found.nonzero().flatten().tolist()) == kept


def test_repetition_penalty_moves_a_token_that_occurred():
    logits = torch.tensor([[1.0, 2.0, 1.9]])
    sampler = Sampler(GenerationParams(temperature=0, repetition_penalty=1.2), torch.device("cpu"))
    assert int(sampler(logits, torch.tensor([[0]]))) == 1
    assert int(sampler(logits, torch.tensor([[1]]))) == 2


def test_the_same_seed_draws_the_same_tokens(model):
    params = GenerationParams(seed=7, temperature=1.5, max_new_tokens=20)
    assert run(model, [5, 6, 7], params)[0] == run(model, [5, 6, 7], params)[0]
    other = GenerationParams(seed=8, temperature=1.5, max_new_tokens=20)
    assert run(model, [5, 6, 7], params)[0] != run(model, [5, 6, 7], other)[0]
