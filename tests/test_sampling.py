"""gptq/sampling.py: which tokens may be drawn and how often, against transformers' own processors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gptq_webui.core.errors import BadParameter
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.sampling import Sampler, _likeliest, _top_n_sigma, log_probabilities
from gptq_webui.gptq.token_rules import TokenRules

CPU = torch.device("cpu")
PLAIN = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1}


def sampler(prompt_tokens=0, **values):
    return Sampler(GenerationParams(**{**PLAIN, **values}), CPU, prompt_tokens)


def greedy(logits, ids, prompt_tokens=0, **values):
    return int(sampler(prompt_tokens, temperature=0, **values)(torch.tensor([logits]), torch.tensor([ids])))


def shares(found, size, count):
    return torch.bincount(torch.tensor(found), minlength=size) / count


def by_transformers(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, top_n_sigma=0.0):
    """The distribution that transformers' generate samples from; top n sigma is that of llama.cpp, before the others."""
    if top_n_sigma:
        logits = logits.masked_fill(logits < logits.max() - top_n_sigma * logits.std(correction=0), float("-inf"))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        warpers.append(TypicalLogitsWarper(typical_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]


CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 40},
    {"top_k": 5},
    {"top_p": 0.3},
    {"top_p": 0.97},
    {"top_p": 0.99999, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 0.001, "temperature": 2.0},
    {"typical_p": 0.6},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 0.7, "temperature": 2.5, "top_p": 0.8, "top_k": 20},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8, "temperature": 1.3},
]


@pytest.mark.parametrize("values", CASES, ids=str)
@pytest.mark.parametrize("size", [50, 3000])
def test_the_distribution_is_that_of_transformers(values, size):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * 3
    kept, names = sampler(**values)._filtered(logits)
    found = torch.zeros(1, size)
    found.scatter_(1, names if names is not None else torch.arange(size)[None], kept.softmax(-1))
    assert torch.allclose(found[0], by_transformers(logits, **values), atol=1e-5)


@pytest.mark.parametrize("values", [CASES[2], CASES[7], CASES[10], {}], ids=str)
def test_tokens_are_drawn_as_often_as_their_probability_says(values):
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(3)) * 3
    draw, ids, count = sampler(**values), torch.tensor([[0]]), 6000
    found = shares([int(draw(logits, ids)) for _ in range(count)], 600, count)
    wanted = by_transformers(logits, **values)
    assert not found[wanted == 0].any()
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert ((found - wanted).abs() <= 5 * spread + 1e-3).all()


def test_repetition_penalty_moves_a_token_that_occurred():
    assert greedy([1.0, 2.0, 1.9], [0], repetition_penalty=1.2) == 1
    assert greedy([1.0, 2.0, 1.9], [1], repetition_penalty=1.2) == 2


def test_the_repetition_penalty_is_that_of_transformers_also_where_an_id_is_no_token():
    scores, ids = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 8, 3, 39, 0]])
    sampler = Sampler(GenerationParams(repetition_penalty=1.3), torch.device("cpu"))
    for given in (ids, torch.tensor([[3, 8, 41, 400]]), torch.tensor([[40]])):
        before = scores.clone()
        found = sampler._changed(scores, given)
        known = given[given < 40][None]
        assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.3)(known, scores)) and torch.equal(scores, before)
        assert int((found != scores).sum()) == len(set(known[0].tolist()))


def test_the_likeliest_token_is_the_first_of_equals_and_a_number_that_is_none_is_found():
    for row in ([1.0, 3.0, 2.0, 3.0], [-math.inf] * 3, [1.0, math.nan, 5.0], [0.0, -0.0]):
        scores = torch.tensor([row])
        assert torch.equal(_likeliest(scores), scores.argmax(-1, keepdim=True))


def test_the_penalty_range_forgets_what_is_further_back():
    assert greedy([1.0, 2.0, 1.9], [1, 0, 0], repetition_penalty=1.2, repetition_range=2) == 1
    assert greedy([1.0, 2.0, 1.9], [0, 1, 0], repetition_penalty=1.2, repetition_range=2) == 2
    assert greedy([1.0, 2.0, 1.9], [0, 1, 0, 0], presence_penalty=0.5, repetition_range=2) == 1


def test_presence_is_taken_once_and_frequency_for_each_time():
    assert greedy([0.0, 2.0, 1.0], [1, 1, 1], presence_penalty=0.9) == 1
    assert greedy([0.0, 2.0, 1.0], [1, 1, 1], frequency_penalty=0.4) == 2
    assert greedy([0.0, 2.0, 1.0], [1], frequency_penalty=0.4) == 1


def test_presence_and_frequency_look_at_the_answer_only():
    assert greedy([0.0, 2.0, 1.0], [1, 1, 1], prompt_tokens=3, frequency_penalty=2.0, presence_penalty=2.0) == 1
    assert greedy([0.0, 2.0, 1.0], [1, 1, 1, 1], prompt_tokens=3, presence_penalty=1.5) == 2


def test_logit_bias_is_added_and_a_token_that_does_not_exist_is_named():
    assert greedy([0.0, 2.0, 1.0], [0], logit_bias={2: 1.5, 1: -0.1}) == 2
    with pytest.raises(BadParameter, match="token 7"):
        greedy([0.0, 2.0, 1.0], [0], logit_bias={7: 1.0})


def test_nothing_of_this_changes_the_logits_it_was_given():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    kept = logits.clone()
    values = {"repetition_penalty": 1.3, "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {1: 3}, "top_k": 2}
    sampler(**values)(logits, torch.tensor([[1, 2]]))
    assert torch.equal(logits, kept)


def test_top_n_sigma_keeps_the_same_tokens_at_every_temperature_and_counts_only_those_that_are_allowed():
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(5)) * 3
    kept = [_top_n_sigma(logits / each, 1.0) > float("-inf") for each in (0.1, 1.0, 4.0)]
    assert 1 < int(kept[0].sum()) < 500 and torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2])
    banned = torch.cat([logits, torch.full((1, 9000), float("-inf"))], dim=1)
    assert torch.equal(_top_n_sigma(banned, 1.0)[:, :500] > float("-inf"), kept[1])


def test_infinite_logits_are_never_drawn():
    logits = torch.full((1, 400), float("-inf"))
    logits[0, 17] = 1.0
    assert {int(sampler(seed=each, min_p=0.1)(logits, torch.tensor([[0]]))) for each in range(5)} == {17}


def test_log_probabilities_come_with_the_likeliest_first():
    logprob, top = log_probabilities(torch.tensor([[0.0, 2.0, 1.0]]), 0, 2)
    wanted = torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1)
    assert abs(logprob - float(wanted[0])) < 1e-6 and [id for id, _ in top] == [1, 2]
    assert log_probabilities(torch.tensor([[0.0, 1.0]]), 0, 0)[1] == ()


class _Waiting(TorchDispatchMode):
    """Operations for which the processor waits for a GPU, by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("nonzero", "_local_scalar_dense", "bincount", "masked_select") or (
            name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "params",
    [
        {"ignore_eos": True},
        {"min_tokens": 50},
        {"presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"custom_token_bans": (3, 5, 10**6)},
        {"min_p": 0.1, "top_k": 20, "top_p": 0.9},
        {"typical_p": 0.9},
    ],
)
def test_a_sampled_token_is_not_waited_for(params):
    """The next step of a recorded model is launched before the host knows the token (gptq/begun_ahead.py)."""
    given = GenerationParams(**{"temperature": 0.8, "top_k": 40, "seed": 1, "repetition_penalty": 1.0, **params})
    sampler = Sampler(given, torch.device("cpu"), 4, TokenRules(ends=frozenset({2, 7}), banned=frozenset({2, 3, 10**6})))
    logits, ids = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 2, 3, 4, 9, 9, 11]])
    sampler(logits, ids)  # makes what it keeps
    with _Waiting() as waiting:
        for _ in range(3):
            token = sampler(logits, ids)
            ids = torch.cat([ids, token], 1)
    assert waiting.found == []
    assert not {2, 3} & set(ids[0, 7:].tolist())
