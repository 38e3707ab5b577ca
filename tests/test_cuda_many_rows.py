"""16, 64 and 128 answers at once on a GPU: arrivals, cancels, mixed sampling and grammars. Skipped without a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from test_cuda_batch_step import GREEDY, SAMPLED, first_doubt, ids_of, shared, solo  # noqa: F401 (a fixture)

from gptq_webui.core.chat import Step, Token
from gptq_webui.core.grammar import Grammar
from gptq_webui.gptq.cuda.kv_pages import PagedMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

KINDS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "likely": replace(GREEDY, logprobs=2),
    "biased": replace(GREEDY, logit_bias=((9, 2.0),)),
    "plain": replace(SAMPLED, top_k=0, top_p=1, repetition_penalty=1),
    "dry": replace(GREEDY, dry_multiplier=0.8),
}


def params_of(at):
    found = list(KINDS.values())[at % len(KINDS)]
    return replace(found, max_new_tokens=20 + at % 21, seed=at)


@pytest.mark.parametrize("count", [16, 64, 128])
def test_each_is_what_it_is_alone_while_others_come_and_go(shared, count):  # noqa: F811
    model, twin = shared
    torch.manual_seed(count)
    prompts = [torch.randint(4, 288, (5 + 7 * at % 190,)).tolist() for at in range(count)]
    alone = [solo(model, prompt, params_of(at)) for at, prompt in enumerate(prompts)]
    model._prefix.clear()
    flags = [threading.Event() for _ in prompts]
    streams, found = [], {}
    for at, (prompt, flag) in enumerate(zip(prompts, flags, strict=True)):
        streams.append(model.generate(prompt, params_of(at), flag))
        if at % 16 == 15:  # the others come while these write
            found[at] = [next(streams[at])]
        if at % 8 == 3:
            flags[at - 1].set()
    different = 0
    for at, stream in enumerate(streams):
        events = found.get(at, []) + list(stream)
        ids, mine = ids_of(events), alone[at]
        if flags[at].is_set():
            assert events[-1].reason in ("cancelled", "length")
            mine = mine[: len(ids)]
        if params_of(at).temperature:  # noise decides, so two may be as near each other anywhere
            different += ids != mine
            continue
        sure = min(first_doubt(twin, prompts[at], mine, GREEDY), len(ids))
        assert ids[:sure] == mine[:sure], at
    assert different <= count // 16
    likely = [each for each in events if isinstance(each, Step)] if params_of(count - 1).logprobs else []
    assert all(each.top[0][1] >= each.logprob - 1e-4 for each in likely)


def test_grammars_in_many_rows_are_obeyed_and_the_others_stay_as_they_are(shared):  # noqa: F811
    pytest.importorskip("llguidance")
    model, twin = shared
    prompts = [torch.randint(4, 260, (10 + at,)).tolist() for at in range(32)]
    grammar = replace(SAMPLED, grammar=Grammar("regex", "[a-f]{20}"), top_k=0, top_p=1, repetition_penalty=1)
    plain = {at: solo(model, prompts[at], GREEDY) for at in range(0, 32, 2)}
    model._end_ids = {1}
    alone = {at: solo(model, prompts[at], replace(grammar, seed=at)) for at in range(1, 32, 2)}
    model._prefix.clear()
    asked = [replace(grammar, seed=at) if at % 2 else GREEDY for at in range(32)]
    streams = [model.generate(*each, threading.Event()) for each in zip(prompts, asked, strict=True)]
    found = [ids_of(each) for each in streams]
    assert sum(found[at] != alone[at] for at in alone) <= 2
    for at in alone:
        text = model.tokenizer.decode(found[at])
        assert len(text) == 20 and set(text) <= set("abcdef")
    for at, mine in plain.items():
        sure = min(first_doubt(twin, prompts[at], mine, GREEDY), len(found[at]))
        assert found[at][:sure] == mine[:sure]


def test_memory_stays_what_it_is_and_answers_that_lost_their_pages_say_the_same(shared):  # noqa: F811
    model, twin = shared
    pool = model._stepper._step.pages
    prompts = [torch.randint(4, 288, (60 + at % 30,)).tolist() for at in range(24)]
    alone = [solo(model, each, GREEDY) for each in prompts]
    model._prefix.clear()
    held = []
    before = pool.limit_bytes
    pool.limit_bytes = pool.size_bytes
    blocker = PagedMemory(pool)
    while pool.free_pages > 12:
        blocker.pages.append(pool.take())
    for _ in range(3):
        streams = [model.generate(each, GREEDY, threading.Event()) for each in prompts]
        for prompt, mine, stream in zip(prompts, alone, streams, strict=True):
            ids = ids_of(stream)
            sure = first_doubt(twin, prompt, mine, GREEDY)
            assert len(ids) == len(mine) and ids[:sure] == mine[:sure]
        model._prefix.clear()
        held.append((torch.cuda.memory_allocated(), pool.used_bytes))
    assert held[1] == held[2] and pool.used_bytes == blocker.size_bytes
    pool.limit_bytes = before


def test_texts_are_scored_and_embedded_beside_answers(shared):  # noqa: F811
    model, twin = shared
    ids = torch.randint(4, 288, (150,)).tolist()
    prompts = [torch.randint(4, 288, (20 + at,)).tolist() for at in range(16)]
    alone = [solo(model, each, GREEDY) for each in prompts]
    scores = [each.logprob for each in model.score(ids, 1, threading.Event()) if isinstance(each, Token)][1:150]
    (vector,) = model.embed([ids], "mean", threading.Event())
    model._prefix.clear()
    streams = [model.generate(each, GREEDY, threading.Event()) for each in prompts]
    started = ids_of([next(streams[0])])
    beside = [each.logprob for each in model.score(ids, 1, threading.Event()) if isinstance(each, Token)][1:150]
    (again,) = model.embed([ids], "mean", threading.Event())
    assert max(abs(one - other) for one, other in zip(scores, beside, strict=True)) < 0.02
    assert sum(one * other for one, other in zip(vector, again, strict=True)) > 0.999
    for prompt, mine, stream in zip(prompts, alone, streams, strict=True):
        found = (started if stream is streams[0] else []) + ids_of(stream)
        sure = min(first_doubt(twin, prompt, mine, GREEDY), len(found))
        assert found[:sure] == mine[:sure]
