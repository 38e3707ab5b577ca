"""Answers with a grammar on a GPU: token by token, beside others that it samples ahead. Skipped without a GPU."""

import json
import threading

import pytest
import torch

pytest.importorskip("llguidance")

from test_cuda_batch_step import GREEDY, first_doubt, ids_of, shared, solo  # noqa: F401 (a fixture)
from test_cuda_stepper import load
from test_grammar_matcher import SCHEMA, schema

from gptq_webui.core.grammar import Grammar
from gptq_webui.core.params import GenerationParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def with_grammar(grammar, seed):
    return GenerationParams(
        grammar=grammar, seed=seed, temperature=1.0, repetition_penalty=1, top_p=1, top_k=0, max_new_tokens=200
    )


def text_of(model, events):
    return model.tokenizer.decode(ids_of(events))


def test_alone_and_the_gpu_samples_again_afterwards(tmp_path, monkeypatch):
    model, _twin = load(tmp_path, "llama", monkeypatch)
    try:
        assert model._stepper.kernel == "cuda", model.notes
        before = solo(model, [5, 6, 7, 8], GREEDY)
        for seed in range(3):
            events = list(model.generate([5, 6, 7, 8], with_grammar(schema(), seed), threading.Event()))
            assert set(json.loads(text_of(model, events))) == set(SCHEMA["required"]) and events[-1].reason == "stop"
        assert solo(model, [5, 6, 7, 8], GREEDY) == before
    finally:
        model.close()


def test_beside_others_neither_disturbs_the_other(shared):  # noqa: F811
    model, twin = shared
    prompts = [torch.randint(4, 260, (20 + at,)).tolist() for at in range(4)]
    alone = [solo(model, each, GREEDY) for each in prompts]
    model._end_ids = {1}
    params = [with_grammar(Grammar("regex", "[a-f]{30}"), 1), with_grammar(schema(), 2)]
    asked = [(prompts[0], GREEDY), (prompts[1], params[0]), (prompts[2], GREEDY), (prompts[3], params[1])]
    streams = [model.generate(*each, threading.Event()) for each in asked]
    found = [list(each) for each in streams]
    for at in (0, 2):
        host_tokens = ids_of(found[at])
        sure = min(first_doubt(twin, prompts[at], alone[at], GREEDY), len(host_tokens))
        assert host_tokens[:sure] == alone[at][:sure]
    letters = text_of(model, found[1])
    assert len(letters) == 30 and set(letters) <= set("abcdef") and found[1][-1].reason == "stop"
    assert set(json.loads(text_of(model, found[3]))) == set(SCHEMA["required"])
