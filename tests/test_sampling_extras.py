"""gptq/sampling_extras.py and gptq/banned_texts.py: against computations of their own, written from the published formulas."""

import math
import random
import threading

import pytest
import torch

import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import sampling_extras as extras
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.sampling import Sampler
from gptq_webui.gptq.token_rules import TokenRules

CPU = torch.device("cpu")
PLAIN = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1}
NEVER = float("-inf")


def params(**values):
    return GenerationParams(**{**PLAIN, **values})


def logits(size=200, seed=0, scale=3.0):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * scale


# --- DRY ---------------------------------------------------------------------------------------------------


def losses_by_suffixes(ids, multiplier, base, allowed, breakers):
    """The definition: the longest end of the ids that occurred before, without a breaker, decides a token's loss."""
    found = {}
    for at in range(1, len(ids)):  # the token at `at` followed ids[:at]
        length = 0
        while length < min(at, 50) and ids[at - 1 - length] == ids[-1 - length] and ids[-1 - length] not in breakers:
            length += 1
        if length >= max(allowed, 1) and ids[at] not in breakers:
            found[ids[at]] = max(found.get(ids[at], 0), multiplier * base ** (length - allowed))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_dry_takes_what_its_definition_says(seed):
    dice = random.Random(seed)
    ids = [dice.randrange(4) for _ in range(dice.randrange(1, 90))]
    breakers = {3} if seed % 2 else set()
    allowed = dice.randrange(1, 5)
    found = extras.dry_losses(ids, params(dry_multiplier=0.8, dry_allowed_length=allowed), breakers)
    wanted = losses_by_suffixes(ids, 0.8, 1.75, allowed, breakers)
    assert found == pytest.approx(wanted)


def test_dry_ends_a_loop_and_looks_back_only_as_far_as_its_range():
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    scores = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.5]])
    assert int(Sampler(params(temperature=0), CPU)(scores, ids)) == 3
    assert int(Sampler(params(temperature=0, dry_multiplier=1), CPU)(scores, ids)) == 4
    assert int(Sampler(params(temperature=0, dry_multiplier=1, dry_penalty_last_n=3), CPU)(scores, ids)) == 3
    assert int(Sampler(params(temperature=0, dry_multiplier=1), CPU, rules=TokenRules(breakers=frozenset({2})))(scores, ids)) == 3
    assert scores.tolist() == [[0.0, 0.0, 0.0, 2.0, 1.5]]


# --- XTC, dynamic temperature, smoothing -----------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3, 0.6])
def test_xtc_leaves_the_least_likely_of_those_over_the_threshold_and_all_others(threshold):
    scores = logits()
    shares = scores.softmax(-1)[0].tolist()
    over = sorted((each for each in range(200) if shares[each] >= threshold), key=lambda id: shares[id])
    dropped = set(over[1:])
    found = extras.without_top_choices(scores, threshold)[0]
    assert {at for at in range(200) if found[at] == NEVER} == dropped
    assert threshold != 0.02 or len(dropped) > 2


def test_xtc_comes_as_often_as_its_probability_says():
    scores = torch.tensor([[math.log(0.6), math.log(0.4)]])
    sampler = Sampler(params(xtc_probability=0.5, xtc_threshold=0.3), CPU)
    found = [int(sampler(scores, torch.tensor([[0]]))) for _ in range(4000)]
    assert abs(found.count(0) / 4000 - 0.5 * 0.6) < 0.03


@pytest.mark.parametrize(("exponent", "spread"), [(1.0, 0.5), (2.5, 0.9), (0.5, 2.0)])
def test_dynamic_temperature_lies_between_its_ends_by_the_entropy(exponent, spread):
    scores = logits(seed=3)
    scores[0, 50:] = NEVER
    shares = [each for each in scores.double().softmax(-1)[0].tolist() if each > 0]
    entropy = -sum(each * math.log(each) for each in shares) / math.log(50)
    low, high = max(0.0001, 1.2 - spread), 1.2 + spread
    wanted = scores / (low + (high - low) * entropy**exponent)
    found = extras.tempered(scores, params(temperature=1.2, dynatemp_range=spread, dynatemp_exponent=exponent))
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_dynamic_temperature_of_a_single_token_is_the_lowest():
    scores = torch.tensor([[2.0, NEVER]])
    assert extras.tempered(scores, params(temperature=1, dynatemp_range=0.5)).tolist() == [[4.0, NEVER]]


@pytest.mark.parametrize(("factor", "curve"), [(0.3, 1.0), (0.3, 2.5), (1.5, 4.0)])
def test_smoothing_is_a_parabola_below_the_highest_and_a_cubic_with_a_curve(factor, curve):
    scores = logits(seed=4)
    scores[0, 7] = NEVER
    highest = float(scores.max())
    found = extras.smoothed(scores, factor, curve)[0].tolist()
    for before, after in zip(scores[0].tolist(), found, strict=True):
        x = before - highest
        wanted = before if before == NEVER else highest - (3 - curve) / 2 * factor * x**2 + (curve - 1) / 2 * factor * x**3
        assert after == pytest.approx(wanted, rel=1e-4, abs=1e-4)


# --- mirostat ----------------------------------------------------------------------------------------------


def kept_by_version_2(shares, mu):
    kept = []
    for each in sorted(shares, reverse=True):
        if kept and -math.log2(each) > mu:
            break
        kept.append(each)
    return kept


def test_mirostat_2_keeps_the_tokens_below_its_surprise_and_corrects_it():
    scores = logits(seed=5)
    sampler = extras.Mirostat(params(mirostat=2, mirostat_tau=3, mirostat_eta=0.2))
    assert sampler.mu == 6
    shares = scores.double().softmax(-1)[0]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        mu = sampler.mu
        kept = kept_by_version_2(shares.tolist(), mu)
        id = int(sampler(scores, torch.rand(1, 1, generator=generator, dtype=torch.float64)))
        assert float(shares[id]) >= min(kept) - 1e-12
        surprise = -math.log2(float(shares[id]) / sum(kept))
        assert sampler.mu == pytest.approx(mu - 0.2 * (surprise - 3), abs=1e-6)


def test_mirostat_1_keeps_as_many_as_the_formula_of_the_paper():
    scores = logits(size=1000, seed=6)
    shares = sorted(scores.double().softmax(-1)[0].tolist(), reverse=True)
    above = below = 0.0
    for at in range(99):
        t = math.log((at + 2) / (at + 1))
        above += t * math.log(shares[at] / shares[at + 1])
        below += t * t
    s = above / below
    k = ((s - 1) * 2**6 / (1 - 1000 ** (1 - s))) ** (1 / s)
    sampler = extras.Mirostat(params(mirostat=1, mirostat_tau=3))
    assert sampler._by_exponent(torch.tensor(shares, dtype=torch.float64)) == max(1, int(k))


def test_a_flat_distribution_does_not_break_mirostat():
    flat = torch.zeros(1, 50)
    for version in (1, 2):
        sampler = Sampler(params(mirostat=version, mirostat_tau=0.5), CPU)
        assert all(0 <= int(sampler(flat, torch.tensor([[0]]))) < 50 for _ in range(30))


# --- bans --------------------------------------------------------------------------------------------------


def test_banned_tokens_and_last_tokens_of_bad_words_are_never_sampled():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    rules = TokenRules(banned=frozenset({0, 99}), bad_words=((3, 1), (2,)))

    def chosen(ids, prompt=1):
        return int(Sampler(params(temperature=0), CPU, prompt, rules)(scores, torch.tensor([ids])))

    assert chosen([9]) == 1
    assert chosen([9, 3]) == 3  # 1 would complete (3, 1), 2 is banned
    assert chosen([3]) == 1  # the 3 is of the prompt


def test_end_tokens_wait_for_the_least_number_of_tokens():
    scores = torch.tensor([[5.0, 4.0]])
    sampler = Sampler(params(temperature=0, min_tokens=2), CPU, 1, TokenRules(ends=frozenset({0})))
    assert [int(sampler(scores, torch.tensor([[1] * count]))) for count in (1, 2, 3)] == [1, 1, 0]


class Words:
    """BannedTexts over ids as words: a sequence of ids is banned."""

    def __init__(self, *banned):
        self.banned = banned

    def begins(self, ids):
        ids = tuple(ids)
        hits = [at for at in range(len(ids)) for each in self.banned if ids[at : at + len(each)] == each]
        if hits:
            return min(hits), 0
        held = max((n for each in self.banned for n in range(1, len(each)) if ids[-n:] == each[:n]), default=0)
        return None, len(ids) - held


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny.dense_model(request.param)


def run(model, texts, count=16, prefix=None, **values):
    settings = params(**{"temperature": 0, "max_new_tokens": count, **values})
    rules = TokenRules(ends=frozenset({1}), texts=texts)
    prefix = prefix or PrefixCache()
    events = list(
        generate(model, [5, 6, 7, 8], settings, threading.Event(), prefix=prefix, end_ids=(), context_tokens=200, rules=rules)
    )
    assert isinstance(events[-1], Finish)
    return [each for each in events if isinstance(each, Step)], events[-1]


def test_an_answer_goes_back_to_where_a_banned_text_began_and_takes_the_next_best_there(model):
    free, _ = run(model, None)
    ids = [each.id for each in free]
    banned = tuple(ids[4:7])
    found, finish = run(model, Words(banned), logprobs=0)
    other = [each.id for each in found]
    assert not any(tuple(other[at : at + 3]) == banned for at in range(len(other)))
    first = next(at for at in range(len(ids)) if tuple(ids[at : at + 3]) == banned)
    assert other[:first] == ids[:first] and other[first] != ids[first]
    assert len(other) == 16 or finish.reason == "stop"
    with torch.inference_mode():  # the token after the return is the second best there, and its logits are the model's
        scores = model(torch.tensor([[5, 6, 7, 8, *other[:first]]])).logits[0, -1].log_softmax(-1)
        scores[ids[first]] = NEVER
        assert int(scores.argmax()) == other[first] and abs(float(scores.max()) - found[first].logprob) < 1e-3


def test_what_is_kept_of_the_conversation_is_what_was_said(model):
    ids = [each.id for each in run(model, None)[0]]
    prefix = PrefixCache()
    found = [each.id for each in run(model, Words(tuple(ids[2:4])), prefix=prefix)[0]]
    memory, same = prefix.take([5, 6, 7, 8, *found, 9])
    assert same >= 4 + len(found) - 1 and memory.length == same


def test_a_banned_first_token_and_a_text_that_fills_the_answer(model):
    ids = [each.id for each in run(model, None)[0]]
    found = [each.id for each in run(model, Words((ids[0],)), count=3)[0]]
    assert ids[0] not in found and len(found) == 3
    held = [each.id for each in run(model, Words((*ids[:3], 0)), count=3)[0]]
    assert held == ids[:3]  # the end of the answer lets go what was held back
