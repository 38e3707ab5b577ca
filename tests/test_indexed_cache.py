"""Models whose attention chooses among its tokens by an indexer: its keys in a recorded forward, of one and of several."""

import emulated_gpu
import hub_folder
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW, PROMPTS, apart
from test_transformers_stepper import IDS, Replay, check, error, graph, plain, whole
from transformers import AutoModelForCausalLM

from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, graph_stepper, stepper_choice
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.prefix_cache import PrefixCache

pytestmark = NEW
INDEXED = [each for each in ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text") if each in KINDS]
# Fewer tokens are chosen than the conversations here have, by so many heads that rounding makes no other choice.
CHOSEN = {"index_topk": 8, "index_n_heads": 64}
BLOCKS = "minimax_m3_vl_text"  # chooses blocks, for each head
INDEXED += [BLOCKS] if BLOCKS in KINDS else []
CHOSEN_BLOCKS = {
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 3,
    "index_local_blocks": 1,
}  # fmt: skip


SHARED = {"indexer_types": ["full", "shared"] * 2}  # layers that heed what the one before has chosen


def chosen_of(kind, **more):
    own = SHARED if kind in ("glm_moe_dsa", "hy_v4") else {}
    return (CHOSEN_BLOCKS if kind == BLOCKS else CHOSEN | own) | more


def choosing(kind):
    """A model that heeds fewer tokens than there are."""
    model = tiny_model(kind, **chosen_of(kind))
    every = tiny_model(kind, **chosen_of(kind, **({"index_topk_blocks": 64} if kind == BLOCKS else {"index_topk": 64})))
    assert error((whole(model, IDS)[-1],), whole(every, IDS)[-1]) > 1e-2
    return model


@pytest.mark.parametrize("kind", INDEXED)
@pytest.mark.parametrize("made", [plain, graph])
def test_a_conversation_longer_than_what_is_chosen_continues_as_one_forward(kind, made):
    model = choosing(kind)
    stepper = made(model)
    assert not getattr(stepper, "why", "")
    check(model, stepper)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:20])
        stepper.step(memory, IDS[20])
        forked = memory.fork(12)
        assert memory.cut(15) and forked is not None
        wanted, other = whole(model, [*IDS[:15], 7, *IDS[:4]]), whole(model, [*IDS[:12], 9, *IDS[:4]])
        for at, id in enumerate([7, *IDS[:4]]):
            assert error(stepper.step(memory, id), wanted[15 + at]) < 1e-4
        for at, id in enumerate([9, *IDS[:4]]):
            assert error(stepper.step(forked, id), other[12 + at]) < 1e-4
        assert memory.size_bytes == stepper_bytes(memory) and forked.size_bytes == stepper_bytes(forked)
    stepper.close()


def stepper_bytes(memory):
    """Of all that its layers hold once they hold it themselves."""
    found = [getattr(layer, name, None) for layer in memory.layers for name in ("keys", "values", "indexer_keys", "idx_keys")]
    return sum(each.numel() * each.element_size() for each in found if each is not None)


@pytest.mark.skipif(not INDEXED, reason="this transformers has no such model")
def test_a_longer_conversation_takes_its_indexer_keys_along(monkeypatch):
    monkeypatch.setattr(graph_stepper, "FIRST_CAPACITY", 16)
    model, recorder = choosing(INDEXED[0]), Replay()
    stepper = GraphStepper(model, 256, recorder)
    wanted = whole(model, IDS)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:10])
        for at in range(10, 40):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        assert memory.cut(12)
        for at in range(12, 20):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
    assert recorder.recorded == 5 and not stepper.why, "rooms of 16, 32 and 64; in the last also what sees 16 and 32"


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """A kind -> (its stepper on an emulated GPU, what a conversation's tokens give without it)."""
    made = []

    def stepper(kind, **changes):
        hub_folder.write(tmp_path, tiny_model(kind, wide=True, **(changes or chosen_of(kind))), group_size=32, act_order=False)
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
        hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float16, device_map={"": "cpu"})
        emulated_gpu.emulate(monkeypatch)
        monkeypatch.setattr(stepper_choice, "_free_bytes", lambda device: 1 << 32)
        found, _note = stepper_choice.stepper_for(hf, 128, parallel=4)
        made.append(found)
        return found, lambda ids: whole(twin, ids)

    yield stepper
    for each in made:
        each.close()


def right(off):
    """Whether most rows are off by what rounding makes; in some it chooses another token, which later ones then see."""
    return sorted(off)[len(off) * 6 // 10] < 1e-2  # without a choice nine of ten are off by 0.1 and more


def compare(stepper, wanted):
    """A prompt, and single tokens with and without a graph."""
    rows, off = wanted(IDS), []
    with torch.inference_mode():
        assert right(apart(stepper.all_logits(stepper.begin(), IDS), rows).tolist())
        for without_graph in (False, True):
            memory = stepper.begin()
            stepper.prefill(memory, IDS[:14])
            step = stepper._prompts.step if without_graph else stepper.step
            off += [float(apart(step(memory, IDS[at])[0], rows[at])) for at in range(14, 40)]
    assert right(off), off


@pytest.mark.parametrize("kind", INDEXED)
def test_kernels_of_ours_attend_to_what_is_chosen(kind, on_gpu):
    stepper, wanted = on_gpu(kind)
    assert stepper.kernel == "graph"
    compare(stepper, wanted)


@pytest.mark.parametrize("kind", INDEXED)
def test_several_answers_choose_each_among_its_own_tokens(kind, on_gpu):
    stepper, wanted = on_gpu(kind)
    assert stepper.kernel == "graph" and stepper.parallel == 4
    off, held = [], [list(each) for each in PROMPTS]
    with torch.inference_mode():
        memories = [stepper.begin() for _ in held]
        for memory, ids in zip(memories, held, strict=True):
            stepper.prefill(memory, ids)
        for turn in range(16):
            if turn == 8:  # one goes back, one is computed alone, and one begins anew from the beginning of another
                assert memories[0].cut(20)
                memories[2] = memories[0].fork(15)
                held = [held[0][:20], [*held[1], 7], held[0][:15]]
                off.append(float(apart(stepper.step(memories[1], 7)[0], wanted(held[1])[-1])))
            held = [[*ids, IDS[turn + at]] for at, ids in enumerate(held)]
            found = stepper._rows.logits([(memory, ids[-1]) for memory, ids in zip(memories, held, strict=True)])
            off += [float(apart(row, wanted(ids)[-1])) for row, ids in zip(found, held, strict=True)]
    assert right(off), off


@pytest.mark.skipif(not INDEXED, reason="this transformers has no such model")
def test_generate_chooses_by_the_graph_too():
    pytest.importorskip("numba")
    from test_patched_forward import OTHER, PROMPT, generate

    model, twin = choosing(INDEXED[0]), choosing(INDEXED[0])
    for each in (model, twin):
        each.generation_config.eos_token_id = each.generation_config.pad_token_id = None
    stepper = graph(model)
    stepper.take_over(model, PrefixCache())
    for ids, settings in (
        (PROMPT, {}), (OTHER, {"num_beams": 2}), (PROMPT.expand(2, -1), {}), (PROMPT, {"repetition_penalty": 1.2}),
    ):  # fmt: skip
        assert generate(model, ids, 20, **settings).tolist() == generate(twin, ids, 20, **settings).tolist()
    assert stepper._patch is not None and not stepper.why
    stepper.close()
