"""Several answers at once of models whose own forward is recorded, on a GPU that is emulated (emulated_gpu.py)."""

import threading
from dataclasses import replace
from itertools import chain

import emulated_gpu
import hub_folder
import pytest
import torch
from every_architecture import tiny_model
from test_cuda_every_architecture import NEW, in_turns
from test_sampling_extras import Words

from gptq_webui.core.chat import Step
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, generation, graph_rows, stepper_choice
from gptq_webui.gptq.cuda import small_batch
from gptq_webui.gptq.graph_rows import rows_that_fit
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.static_rows import Row
from gptq_webui.gptq.suitability import Unsuited
from gptq_webui.gptq.token_rules import TokenRules
from gptq_webui.gptq.transformers_stepper import TransformersStepper

pytestmark = NEW
CONTEXT = 128
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=8)
SEEDED = GenerationParams(temperature=1.0, top_p=0.95, top_k=3, repetition_penalty=1.1, seed=7, max_new_tokens=8)
PROMPTS = [[5, 9, 2, 7, 3, 8, 4, 6, 1, 9, 4], [4, 4, 9], [8, 1, 6, 2, 2], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed folders by kind, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            hub_folder.write(made[kind], tiny_model(kind, wide=True), group_size=32, act_order=False)
        return made[kind] / "packed"

    return folder


@pytest.fixture
def stepper_of(folders, monkeypatch):
    made = []

    def stepper(kind="llama", parallel=4, free=1 << 32, **how):
        hf, _notes = checkpoint.load(LocalModel.read(folders(kind)), dtype=torch.float16, device_map={"": "cpu"})
        if not made:
            emulated_gpu.emulate(monkeypatch)
        monkeypatch.setattr(stepper_choice, "_free_bytes", lambda device: free)
        found, _note = stepper_choice.stepper_for(hf, CONTEXT, parallel=parallel, **how)
        made.append(found)
        assert found.kernel == "graph"
        return found

    yield stepper
    for each in made:
        each.close()


def answer(stepper, ids, params=GREEDY, prefix=None, cancel=None, rules=None):
    cancel, prefix = cancel or threading.Event(), prefix or PrefixCache()
    return generation.generate(stepper, ids, params, cancel, prefix=prefix, end_ids=(), context_tokens=CONTEXT, rules=rules)


def alone(stepper, ids, params=GREEDY, rules=None):
    return [each.id for each in answer(stepper, ids, params, rules=rules) if isinstance(each, Step)]


@pytest.mark.parametrize(("kind", "params"), [
    ("llama", GREEDY), ("llama", SEEDED), ("llama", replace(GREEDY, logprobs=2)),
    ("dbrx", GREEDY), ("jetmoe", GREEDY), ("gpt_neo", GREEDY), ("gpt_neo", SEEDED), ("longcat_flash", GREEDY),
])  # fmt: skip
def test_answers_side_by_side_are_those_of_each_alone(stepper_of, kind, params):
    stepper = stepper_of(kind)
    assert stepper.parallel == 4
    wanted = [alone(stepper, ids, params) for ids in PROMPTS[:4]]
    assert in_turns([answer(stepper, ids, params) for ids in PROMPTS[:4]], joins=(1, 1, 3, 6)) == wanted
    assert len({tuple(each) for each in wanted}) > 1
    assert [alone(stepper, ids, params) for ids in PROMPTS[:4]] == wanted


def test_rows_are_computed_by_one_forward(stepper_of, monkeypatch):
    stepper, passes = stepper_of(), []
    compute = stepper._rows.step
    monkeypatch.setattr(stepper._rows, "step", lambda rows: passes.append(len(rows)) or compute(rows))
    in_turns([answer(stepper, ids) for ids in PROMPTS[:3]])
    assert passes.count(3) >= 6 and len(passes) <= 10
    alone(stepper, PROMPTS[0])
    assert len(passes) <= 10, "an answer that is alone has the graph of one"


def test_every_prompt_that_has_room_is_read_by_one_forward(stepper_of, monkeypatch):
    stepper, lengths = stepper_of(), []
    stepper._prompts.chunk_tokens = stepper.chunk_tokens = 40
    in_turns([answer(stepper, ids) for ids in PROMPTS[:3]])
    read = stepper._prompts._forward
    monkeypatch.setattr(stepper._prompts, "_forward", lambda memory, ids: lengths.append(len(ids)) or read(memory, ids))
    one, prompts = replace(GREEDY, max_new_tokens=1), [[(at * 7 + first) % 11 for at in range(36)] for first in range(4)]
    wanted = [alone(stepper, ids, one) for ids in prompts]
    assert lengths == [36] * 4, "one after the other"
    lengths.clear()
    assert in_turns([answer(stepper, ids, one) for ids in prompts]) == wanted
    assert lengths == [36] * 4, "together"


def test_more_answers_than_rows_take_turns_and_conversations_go_on(stepper_of):
    stepper, prefix = stepper_of(parallel=2), PrefixCache()
    assert stepper.parallel == 2
    longer = [replace(GREEDY, max_new_tokens=4), replace(GREEDY, max_new_tokens=12)]
    wanted = [alone(stepper, ids, params) for ids, params in zip(PROMPTS, chain(longer, longer, longer), strict=False)]
    found = in_turns(
        [answer(stepper, ids, params, prefix) for ids, params in zip(PROMPTS, chain(longer, longer, longer), strict=False)]
    )
    assert found == wanted
    more = [[*ids, *tokens, 3, 5] for ids, tokens in zip(PROMPTS, found, strict=True)]
    assert in_turns([answer(stepper, ids, prefix=prefix) for ids in more[:2]]) == [alone(stepper, ids) for ids in more[:2]]


def test_a_conversation_outgrows_the_rows_beside_a_short_one(stepper_of, monkeypatch):
    monkeypatch.setattr(graph_rows, "FIRST_CAPACITY", 16)
    stepper = stepper_of()
    params = replace(GREEDY, max_new_tokens=40)
    wanted = [alone(stepper, ids, params) for ids in PROMPTS[:3]]
    assert in_turns([answer(stepper, ids, params) for ids in PROMPTS[:3]]) == wanted
    assert stepper._rows._room.capacity >= 48


def test_who_leaves_in_the_middle_disturbs_nobody(stepper_of):
    stepper, cancel = stepper_of(), threading.Event()
    wanted = [alone(stepper, ids) for ids in PROMPTS[:3]]
    answers = [answer(stepper, ids, cancel=cancel if at == 1 else None) for at, ids in enumerate(PROMPTS[:3])]
    found = [[], [], []]
    for turn in range(60):
        if turn == 5:
            cancel.set()
        for at, each in enumerate(answers):
            if at == 2 and turn == 7:
                each.close()
            event = next(each, None)
            if isinstance(event, Step):
                found[at].append(event.id)
    assert found[0] == wanted[0] and all(mine == whole[: len(mine)] for mine, whole in zip(found, wanted, strict=True))
    assert len(found[1]) < 8 and len(found[2]) < 8
    assert in_turns([answer(stepper, ids) for ids in PROMPTS[:3]]) == wanted


def test_a_row_keeps_a_conversation_until_another_needs_it(stepper_of):
    stepper = stepper_of(parallel=2)
    rows = stepper._rows
    with torch.inference_mode():
        memories = [stepper.begin() for _ in range(3)]
        for memory, ids in zip(memories, PROMPTS, strict=False):
            stepper.prefill(memory, ids)
        lengths = [each.length for each in memories]
        rows.logits([(memories[0], 3), (memories[1], 4)])
        assert isinstance(memories[0].elsewhere, Row) and memories[0].size_bytes > 0
        rows.logits([(memories[2], 5), (memories[0], 6)])
        assert memories[1].elsewhere is None and memories[1].layers[0].keys.shape[2] == lengths[1] + 1
        assert [each.length for each in memories] == [lengths[0] + 2, lengths[1] + 1, lengths[2] + 1]
        assert memories[0].cut(lengths[0]) and memories[0].layers[0].keys.shape[2] == lengths[0]


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("gemma2", 4),
        ("qwen3_moe", 4),
        ("mixtral", 4),
        ("gpt_oss", 4),
        ("deepseek_v2", 4),
        ("falcon", 4),
        ("qwen3_next", 1),
        ("mamba2", 1),
    ],
)
def test_who_can_compute_several_answers(stepper_of, kind, parallel):
    assert stepper_of(kind).parallel == parallel


def test_a_wish_for_one_answer_leaves_it_at_one(stepper_of):
    assert stepper_of(parallel=1).parallel == 1


def test_a_full_gpu_leaves_it_at_one(stepper_of):
    assert stepper_of(free=1000).parallel == 1
    assert rows_that_fit(0, 100, 10) == 1 and rows_that_fit(8000, 100, 10) == 4 and rows_that_fit(1 << 50, 100, 10) == 32


def test_what_is_wrong_in_rows_is_not_used(stepper_of, monkeypatch, caplog):
    masks = graph_rows.GraphRows._masks
    monkeypatch.setattr(graph_rows.GraphRows, "_masks", lambda *given: masks(*given).roll(1, 0))
    with caplog.at_level("INFO", logger="gptq_webui.gptq"):
        stepper = stepper_of()
    assert stepper.parallel == 1 and "other results" in caplog.text
    assert len(alone(stepper, PROMPTS[0])) == 8


def test_what_cannot_be_recorded_in_many_rows_is_tried_in_fewer(stepper_of, monkeypatch):
    record = graph_rows.GraphRows._record

    def refusing(self, room, rows, shown):
        if rows > 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, room, rows, shown)

    monkeypatch.setattr(graph_rows.GraphRows, "_record", refusing)
    stepper = stepper_of(parallel=8)
    assert stepper.parallel == 2
    assert in_turns([answer(stepper, ids) for ids in PROMPTS[:4]]) == [alone(stepper, ids) for ids in PROMPTS[:4]]


def test_a_gpu_whose_blocks_are_too_small_for_rows_computes_one_answer_at_a_time(stepper_of, monkeypatch):
    def none_fits(packing, epilogue, limit_bytes):
        raise Unsuited(f"a GPU with {limit_bytes} bytes of shared memory for a block")

    monkeypatch.setattr(small_batch, "variants", none_fits)
    stepper = stepper_of()
    assert stepper.parallel == 1 and len(alone(stepper, PROMPTS[0])) == 8


def test_a_long_conversation_stays_whole_while_short_ones_are_computed(stepper_of, monkeypatch):
    monkeypatch.setattr(graph_rows, "FIRST_CAPACITY", 16)
    stepper, prefix = stepper_of(), PrefixCache()
    long = replace(GREEDY, max_new_tokens=30)
    wanted = [alone(stepper, PROMPTS[0], long), *(alone(stepper, ids) for ids in PROMPTS[1:3])]
    first = in_turns([answer(stepper, PROMPTS[0], long, prefix), answer(stepper, PROMPTS[1], long)])
    assert first[0] == wanted[0]
    assert in_turns([answer(stepper, ids) for ids in PROMPTS[1:3]]) == wanted[1:]
    more = [*PROMPTS[0], *first[0], 3, 5]
    assert in_turns([answer(stepper, more, prefix=prefix), answer(stepper, PROMPTS[1])]) == [alone(stepper, more), wanted[1]]


def test_an_answer_that_goes_back_in_its_text_keeps_its_own_logits(stepper_of):
    stepper = stepper_of()
    plain = alone(stepper, PROMPTS[0])
    rules = TokenRules(texts=Words(tuple(plain[3:5])))
    wanted = [alone(stepper, PROMPTS[0], rules=rules), alone(stepper, PROMPTS[1])]
    assert wanted[0] != plain
    assert in_turns([answer(stepper, PROMPTS[0], rules=rules), answer(stepper, PROMPTS[1])]) == wanted


@pytest.mark.parametrize(("code", "parallel"), [("", 4), ("sliding_window", 1)])
def test_a_window_that_only_the_models_own_code_may_mask_is_left_to_it(stepper_of, monkeypatch, code, parallel):
    named = property(lambda self: "sliding_window" in code)
    monkeypatch.setattr(TransformersStepper, "names_windows", named)
    load = checkpoint.load

    def with_window(*given, **how):
        hf, notes = load(*given, **how)
        hf.config.sliding_window = 16
        return hf, notes

    monkeypatch.setattr(checkpoint, "load", with_window)
    assert stepper_of().parallel == parallel
