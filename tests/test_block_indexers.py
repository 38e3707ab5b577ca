"""gptq/block_indexers.py: the choice of blocks of tokens, and a recorded forward that makes it."""

import emulated_gpu
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW
from test_transformers_stepper import IDS, check, error, plain, whole

from gptq_webui.gptq import block_indexers, graph_stepper
from gptq_webui.gptq.block_indexers import BlockIndexers
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.transformers_memory import kept_by_tokens

KIND = "qwen4_exp_text"
pytestmark = [NEW, pytest.mark.skipif(KIND not in KINDS, reason="this transformers has no such model")]
TWO = {"indexer_n_heads": 16}  # with fewer of them some blocks are worth exactly nothing, and any of those may be chosen
FOUR = TWO | {"indexer_budget": 8, "indexer_compress_ratio": 4}


def recorded(model):
    """What would wait for a GPU is refused, and what was recorded is computed again without the model's code."""
    stepper = GraphStepper(model, 256, emulated_gpu.Recorder(None))
    stepper.trial()
    assert bool(stepper.why) is not keeps_positions()
    return stepper


def keeps_positions():
    """Before 5.24 transformers keeps the positions of such a model beside its layers, and no graph is made."""
    stepper = plain(tiny_model(KIND))
    memory = stepper.begin()
    with torch.inference_mode():
        stepper.prefill(memory, IDS[:5])
    return any("indexer_position_ids" in kept_by_tokens(each) for each in memory.layers)


@pytest.mark.parametrize("changes", [TWO, FOUR, FOUR | {"indexer_budget": 9, "indexer_compress_ratio": 3}])
def test_the_choice_is_that_of_the_models_own_code(changes):
    model = tiny_model(KIND, **changes)
    known = BlockIndexers(model)
    with known.taken():
        taken = [each for each in model.modules() if "forward" in vars(each)]
    assert taken and taken == known._modules
    assert not [each for each in model.modules() if "forward" in vars(each)]


def test_what_chooses_otherwise_is_left_to_its_own_code(monkeypatch):
    monkeypatch.setattr(block_indexers, "chosen", lambda _m, _q, keys, _a, mask, _t: mask.clone())
    model = tiny_model(KIND)
    known = BlockIndexers(model)
    with known.taken():
        assert not [each for each in model.modules() if "forward" in vars(each)]
    assert set(known._kinds.values()) == {False}


@pytest.mark.parametrize("changes", [TWO, FOUR])
@pytest.mark.parametrize("made", [plain, recorded])
def test_a_conversation_continues_as_one_forward(changes, made):
    model = tiny_model(KIND, **changes)
    every = tiny_model(KIND, **changes | {"indexer_budget": 64})
    assert error((whole(model, IDS)[-1],), whole(every, IDS)[-1]) > 1e-2, "it heeds fewer tokens than there are"
    check(model, made(model))


def test_places_without_a_token_are_in_no_block(monkeypatch):
    if not keeps_positions():
        pytest.skip("no graph is made")
    monkeypatch.setattr(graph_stepper, "FIRST_CAPACITY", 16)
    model = tiny_model(KIND, **FOUR)
    stepper = recorded(model)
    with torch.inference_mode():
        for first in (2, 7, 9):  # the second conversation finds what the first has left behind its end
            ids = IDS[first - 2 :]
            wanted = whole(model, ids)
            memory = stepper.begin()
            stepper.prefill(memory, ids[:first])
            for at in range(first, 30):
                assert error(stepper.step(memory, ids[at]), wanted[at]) < 1e-4
            assert not memory.cut(10) and memory.fork(10) is None
    assert not stepper.why
