"""gptq/static_windows.py: windows and compressed tokens (DeepSeek V4) in a recorded forward, beside one that grows."""

import emulated_gpu
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW
from test_indexed_cache import compare, on_gpu  # noqa: F401
from test_transformers_stepper import IDS, check, error, plain, whole

from gptq_webui.gptq import graph_stepper
from gptq_webui.gptq.graph_stepper import GraphStepper

KIND = "deepseek_v4"
pytestmark = [NEW, pytest.mark.skipif(KIND not in KINDS, reason="this transformers has no such model")]
HEAVY, SPARSE, WINDOW = "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"
LAYERS = [(HEAVY, SPARSE, HEAVY, SPARSE), (WINDOW, HEAVY, SPARSE, WINDOW)]
# Fewer entries are chosen than there are, by so many heads that rounding makes no other choice.
CHOSEN = {"index_topk": 3, "index_n_heads": 32, "compress_rates": {SPARSE: 4, HEAVY: 8}}


def model_of(layers):
    return tiny_model(KIND, layer_types=list(layers), **CHOSEN)


def recorded(model):
    """What would wait for a GPU is refused, and what was recorded is computed again without the model's code."""
    stepper = GraphStepper(model, 256, emulated_gpu.Recorder(None))
    stepper.trial()
    assert not stepper.why
    return stepper


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("made", [plain, recorded])
def test_a_conversation_continues_as_one_forward(layers, made):
    check(model_of(layers), made(model_of(layers)))


@pytest.mark.parametrize("layers", LAYERS)
def test_every_beginning_continues_right(layers, monkeypatch):
    monkeypatch.setattr(graph_stepper, "FIRST_CAPACITY", 16)
    model = model_of(layers)
    stepper, wanted = recorded(model), whole(model_of(layers), IDS)
    with torch.inference_mode():
        for first in (1, 3, 4, 7, 8, 9, 16, 17):
            memory = stepper.begin()
            stepper.prefill(memory, IDS[:first])
            assert [at for at in range(first, 40) if error(stepper.step(memory, IDS[at]), wanted[at]) > 1e-4] == []
            assert memory.size_bytes > 0 and not memory.cut(first) and memory.fork(first) is None
    assert not stepper.why


@pytest.mark.parametrize("layers", LAYERS)
def test_what_comes_back_is_what_grows_without_a_graph(layers):
    stepper = recorded(model_of(layers))
    with torch.inference_mode():
        for first, steps in ((2, 1), (3, 1), (3, 4), (5, 20), (16, 8)):
            memories = [each.begin() for each in (stepper, stepper._prompts)]
            for memory, each in zip(memories, (stepper, stepper._prompts), strict=True):
                each.prefill(memory, IDS[:first])
                for id in IDS[first : first + steps]:
                    each.step(memory, id)
            for found, wanted in zip(memories[0].layers, memories[1].layers, strict=True):
                found, wanted = vars(found), vars(wanted)
                assert set(found) == set(wanted) and (found["values"] is found["keys"]) == (wanted["values"] is wanted["keys"])
                for name in wanted:
                    same(found[name], wanted[name])


def same(found, wanted):
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for name in wanted:
            same(found[name], wanted[name])
    elif isinstance(wanted, torch.Tensor):
        assert found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=1e-3, atol=1e-4)
    else:
        assert found == wanted


def test_a_context_without_room_for_an_entry():
    model = tiny_model(KIND, layer_types=list(LAYERS[0]), compress_rates={SPARSE: 16, HEAVY: 128})
    stepper, wanted = GraphStepper(model, 64, emulated_gpu.Recorder(None)), whole(model, IDS)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:5])
        assert [at for at in range(5, 40) if error(stepper.step(memory, IDS[at]), wanted[at]) > 1e-4] == []
    assert not stepper.why and stepper._room.capacity == 64


def test_a_recording_that_fails_leaves_windows_as_they_were(monkeypatch):
    model = model_of(LAYERS[1])
    stepper, wanted = recorded(model), whole(model_of(LAYERS[1]), IDS)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:20])
        assert error(stepper.step(memory, IDS[20]), wanted[20]) < 1e-4
        stepper._graphs.clear()

        def fails(run):
            run()
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(stepper._recorder, "record", fails)
        for at in range(21, 40):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        assert stepper.why == "out of memory"


@pytest.mark.parametrize("layers", LAYERS)
def test_kernels_of_ours_beside_windows(layers, on_gpu):  # noqa: F811
    stepper, wanted = on_gpu(KIND, layer_types=list(layers), **CHOSEN)
    assert stepper.kernel == "graph" and stepper.parallel == 1
    compare(stepper, wanted)
