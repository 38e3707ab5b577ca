"""gptq/cache_of_ids.py: caches of transformers, cut, copied, reused and read, while the compiled step holds the keys."""

import copy

import pytest
import torch

pytest.importorskip("numba")

from test_families import off
from test_patched_forward import CACHE, EXACT, OTHER, PROMPT, Model, generate
from transformers import DynamicCache, StaticCache


@pytest.fixture(scope="module")
def model():
    model = Model()
    yield model
    model.stepper.close()


def test_a_cache_is_returned_continued_cut_copied_and_emptied(model):
    model.own_calls = 0
    first = model.logits(PROMPT)
    cache = getattr(first, CACHE)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 13
    copied = copy.deepcopy(cache)
    whole = torch.cat([PROMPT, OTHER], 1)
    assert off(model.logits(OTHER, cache).logits[0], model.expected(whole)[0, 13:]) < EXACT
    assert cache.get_seq_length() == 18 and copied.get_seq_length() == 13
    short = torch.cat([PROMPT, OTHER[:, :1], OTHER[:, 3:]], 1)
    cache.crop(-4)
    assert cache.get_seq_length() == 14
    assert off(model.logits(OTHER[:, 3:], cache).logits[0], model.expected(short)[0, 14:]) < EXACT
    other = torch.cat([PROMPT, PROMPT[:, 5:9]], 1)
    assert off(model.logits(PROMPT[:, 5:9], copied).logits[0], model.expected(other)[0, 13:]) < EXACT
    cache.reset()
    assert cache.get_seq_length() == 0
    assert off(model.logits(OTHER, cache).logits[0], model.expected(OTHER)[0]) < EXACT
    assert model.own_calls == 0


def test_two_conversations_in_turns(model):
    caches = [DynamicCache(), DynamicCache()]
    texts = [PROMPT, OTHER]
    for _ in range(4):
        for at, cache in enumerate(caches):
            new = texts[at][:, cache.get_seq_length() :]
            logits = model.logits(new, cache).logits[0, -1:]
            assert off(logits, model.expected(texts[at])[0, -1:]) < EXACT
            texts[at] = torch.cat([texts[at], logits.argmax(-1)[None]], 1)


def test_a_conversation_that_the_step_began_is_continued_by_the_models_own_forward_and_stays_there(model):
    cache = DynamicCache()
    model.logits(PROMPT, cache)
    with torch.no_grad():
        found = model.hf(input_ids=OTHER, output_hidden_states=True, **{CACHE: cache})
    whole = torch.cat([PROMPT, OTHER], 1)
    assert len(found.hidden_states) == 1 + model.hf.config.num_hidden_layers
    assert off(found.logits[0], model.expected(whole)[0, 13:]) < EXACT
    assert type(cache) is DynamicCache and cache.get_seq_length() == 18
    model.own_calls = 0
    longer = torch.cat([whole, OTHER], 1)
    assert off(model.logits(OTHER, cache).logits[0], model.expected(longer)[0, 18:]) < EXACT
    assert model.own_calls == 1


def test_whoever_reads_the_keys_of_a_cache_finds_them(model):
    cache, wanted = DynamicCache(), DynamicCache()
    model.logits(PROMPT, cache)
    with torch.no_grad():
        model.twin(input_ids=PROMPT, **{CACHE: wanted})
    assert len(cache.layers) == model.hf.config.num_hidden_layers
    for found, expected in zip(cache.layers, wanted.layers, strict=True):
        assert off(found.keys.flatten(2)[0], expected.keys.flatten(2)[0]) < EXACT
    cache = DynamicCache()
    model.logits(PROMPT, cache)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 2


def test_generate_continues_a_cache_that_a_program_kept(model):
    cache = DynamicCache()
    first = generate(model.hf, PROMPT, 6, **{CACHE: cache})
    more = torch.cat([first, OTHER], 1)
    expected = generate(model.twin, more, 10).tolist()
    copied = copy.deepcopy(cache)
    model.own_calls = 0
    assert generate(model.hf, more, 10, **{CACHE: cache}).tolist() == expected
    assert generate(model.hf, more, 10, **{CACHE: copied}).tolist() == expected
    assert model.own_calls == 0


def test_our_own_answers_use_what_generate_has_read(model):
    model.prefix.clear()
    found = generate(model.hf, PROMPT, 5)
    memory, held = model.prefix.take(found[0].tolist())
    assert held == 17 and memory.length == 17


def test_a_static_cache_is_left_to_the_models_own_forward(model):
    cache = StaticCache(config=model.hf.config, max_cache_len=64)
    assert off(model.logits(PROMPT, cache).logits[0], model.expected(PROMPT)[0]) < EXACT
    assert type(cache) is StaticCache
