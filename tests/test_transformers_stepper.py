"""gptq/transformers_stepper.py, static_cache.py, graph_stepper.py: every kind of cache, against one forward over everything.

A few kinds of each run here. GPTQ_WEBUI_EVERY_ARCHITECTURE=1 runs all that transformers knows, and tells what it cannot make.
"""

import inspect
import os

import pytest
import torch
import transformers
from every_architecture import KINDS, tiny_model
from packaging import version
from test_every_architecture import REFUSED

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.static_cache import FIRST_CAPACITY
from gptq_webui.gptq.transformers_memory import CACHE_NAMES
from gptq_webui.gptq.transformers_stepper import TransformersStepper

IDS = torch.randint(4, 288, (40,), generator=torch.Generator().manual_seed(1)).tolist()
KEYS = ("gemma2", "gpt_oss", "gpt2", "llama4_text")  # sliding windows, chunks, sinks, learnt positions
# linear attention, convolutions, both in one layer, no keys at all; one that counts the positions of every piece from 0
STATES = ("qwen3_next", "lfm2", "falcon_h1", "mamba", "bamba")
# states in a cache of a class of its own, in a list, in the modules; experts without a gate
OWN = ("minimax", "xlstm", "rwkv", "recurrent_gemma", "nemotron_h")
known = [each for each in (*KEYS, *STATES, *OWN) if each in KINDS]


class Replay:
    """In the place of a CUDA graph: what was recorded is run again."""

    def record(self, run):
        run()
        self.recorded = getattr(self, "recorded", 0) + 1
        return type("Graph", (), {"replay": staticmethod(run)})

    def reset(self):
        pass

    def close(self):
        pass


def plain(model):
    return TransformersStepper(model)


def graph(model):
    stepper = GraphStepper(model, 256, Replay())
    stepper.trial()
    return stepper


def error(found, wanted):
    return float((found[0].double() - wanted.double()).norm() / wanted.double().norm())


def whole(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def check(model, stepper):
    wanted = whole(model, IDS)
    with torch.inference_mode():
        memory = stepper.begin()
        assert error(stepper.prefill(memory, IDS[:14]), wanted[13]) < 1e-4
        assert error(stepper.prefill(memory, IDS[14:24]), wanted[23]) < 1e-4
        for at in range(24, 32):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        other = stepper.begin()
        stepper.prefill(other, IDS[::-1])
        stepper.step(other, 7)  # another conversation in between
        for at in range(32, 40):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        assert memory.length == 40 and other.length == 41 and memory.size_bytes >= 0
        forked = memory.fork(20)
        if forked is not None:
            assert error(stepper.prefill(forked, IDS[20:30]), wanted[29]) < 1e-4
        assert memory.cut(40)
        if memory.cut(20):
            assert error(stepper.step(memory, IDS[20]), wanted[20]) < 1e-4


@pytest.mark.parametrize("kind", known)
@pytest.mark.parametrize("made", [plain, graph])
def test_a_conversation_continues_as_one_forward_over_all_of_it(kind, made):
    model = tiny_model(kind)
    stepper = made(model)
    if version.parse(transformers.__version__).major >= 5 or kind in KEYS:  # before, hybrids had caches of their own classes
        assert not getattr(stepper, "why", "")
    check(model, stepper)
    stepper.close()


@pytest.mark.skipif(not os.environ.get("GPTQ_WEBUI_EVERY_ARCHITECTURE"), reason="GPTQ_WEBUI_EVERY_ARCHITECTURE is not set")
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_continues_as_one_forward(kind):
    if kind in REFUSED:
        pytest.skip("it is refused, because it cannot be continued")
    try:
        model = tiny_model(kind)
        whole(model, IDS)
    except Exception as reason:
        pytest.skip(f"no tiny model could be made: {type(reason).__name__}: {str(reason)[:100]}")
    check(model, plain(model))
    check(model, graph(model))


def test_keys_can_be_cut_and_states_cannot():
    for kind, can in (("gemma2", True), *((each, False) for each in ("qwen3_next", *OWN))):
        if kind not in KINDS or (kind in OWN and version.parse(transformers.__version__).major < 5):
            continue
        stepper = plain(tiny_model(kind))
        with torch.inference_mode():
            memory = stepper.begin()
            stepper.prefill(memory, IDS[:20])
            assert memory.cut(20) and memory.cut(10) == can
            assert (memory.fork(5) is not None) == can and memory.size_bytes > 0


def test_a_longer_conversation_gets_a_larger_room_and_a_new_graph():
    model = tiny_model("llama", max_position_embeddings=4096)
    recorder = Replay()
    stepper = GraphStepper(model, 4096, recorder)
    ids = (IDS * 30)[: FIRST_CAPACITY + 4]
    wanted = whole(model, ids)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, ids[: FIRST_CAPACITY - 4])
        for at in range(FIRST_CAPACITY - 4, FIRST_CAPACITY + 4):
            assert error(stepper.step(memory, ids[at]), wanted[at]) < 1e-4
        assert recorder.recorded == 2
        short = stepper.begin()
        stepper.prefill(short, IDS[:5])
        assert error(stepper.step(short, IDS[5]), whole(model, IDS[:6])[5]) < 1e-4
        assert recorder.recorded == 3  # of the short one, which need not see the whole room
    assert not stepper.why


def test_what_cannot_be_recorded_is_computed_without_a_graph():
    class Refuses(Replay):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    model = tiny_model("llama")
    stepper = GraphStepper(model, 256, Refuses())
    stepper.trial()
    assert stepper.why == "operation not permitted when stream is capturing"
    check(model, stepper.without_graph())


@pytest.mark.parametrize("kind", [each for each in ("llama", *STATES, *OWN) if each in KINDS])
def test_a_recording_that_fails_leaves_the_conversation_as_it_was(kind, monkeypatch):
    """The token is computed anew without a graph, from states that the failed forward must not have advanced."""
    model = tiny_model(kind)
    stepper = graph(model)
    if stepper.why:
        pytest.skip("this transformers has caches of hybrids that no graph takes")
    wanted = whole(model, IDS)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:20])
        assert error(stepper.step(memory, IDS[20]), wanted[20]) < 1e-4
        stepper._graphs.clear()  # as where the conversation has outgrown what is recorded
        layers = next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList))
        forward, fails = layers[-1].forward, [True]

        def full(*args, **given):
            if fails:
                fails.pop()
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **given)

        monkeypatch.setattr(layers[-1], "forward", full)
        for at in range(21, 26):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        assert stepper.why == "out of memory" and not fails


@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_a_graph_that_computes_something_else_is_not_used(kind):
    if kind not in KINDS:
        pytest.skip("this transformers has no such architecture")

    class Wrong(Replay):
        def record(self, run):
            super().record(run)
            return type("Graph", (), {"replay": staticmethod(lambda: None)})

    model = tiny_model(kind)
    stepper = GraphStepper(model, 256, Wrong())
    stepper._ids.fill_(9)
    stepper.trial()
    if version.parse(transformers.__version__).major >= 5 or kind == "llama":  # before, hybrids had caches of their own classes
        assert "other results" in stepper.why
    check(model, stepper.without_graph())


def test_a_forgotten_conversation_leaves_the_room_to_the_next():
    model = tiny_model("llama")
    stepper = graph(model)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:10])
        stepper.step(memory, 5)
        del memory
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:10])
        assert error(stepper.step(memory, IDS[10]), whole(model, IDS[:11])[10]) < 1e-4


def test_a_model_whose_own_forward_fails_is_refused_in_words():
    """As Jamba's of transformers 4 without its kernels for CUDA."""
    model = tiny_model("mamba")

    def forward(input_ids=None, cache_params=None, use_cache=None):
        raise ValueError("Fast Mamba kernels are not available.")

    model.forward = forward
    with pytest.raises(BadCheckpoint, match="transformers cannot compute this model: Fast Mamba kernels are not available"):
        TransformersStepper(model)


@pytest.mark.skipif(version.parse(transformers.__version__).major < 5, reason="all tokens are computed again there")
def test_a_model_that_takes_single_tokens_only_after_others_gets_them_one_by_one():
    """As Mamba's of transformers 5.6."""
    model = tiny_model("mamba")
    before, taken, begun = model.forward, [], []

    def forward(**given):
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        taken.append(given["input_ids"].shape[1])
        if any(each is cache for each in begun) and taken[-1] > 1:
            raise IndexError("index 1 is out of bounds for dimension 2 with size 1")
        output = before(**given)
        begun.append(cache if cache is not None else next(output[name] for name in CACHE_NAMES if name in output))
        return output

    forward.__signature__ = inspect.signature(before)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, -1:]
    model.forward = forward
    with torch.inference_mode():
        stepper = TransformersStepper(model)
        memory = stepper.begin()
        stepper.prefill(memory, [5, 6, 7])
        taken.clear()
        found = stepper.prefill(memory, [8, 9, 10])
    assert taken == [1, 1, 1] and float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.skipif("bamba" not in KINDS, reason="this transformers has no such model")
@pytest.mark.parametrize(("made", "dtype"), [(graph, torch.float32), (plain, torch.bfloat16), (graph, torch.bfloat16)])
def test_a_model_that_counts_from_the_piece_is_given_its_positions(made, dtype):
    model = tiny_model("bamba", wide=True)
    wanted = whole(model, IDS)
    model.to(dtype)
    rounding = error((whole(model, IDS)[-1],), wanted[-1])
    stepper = made(model)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:30])
        found = [stepper.step(memory, id).clone() for id in IDS[30:]]
    assert isinstance(stepper, TransformersStepper) or not stepper.why or "its cache is" in stepper.why
    assert error(found[-1], wanted[-1]) < 2 * rounding + 1e-3
    stepper.close()
