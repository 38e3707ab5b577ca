"""Several answers at once of models whose own forward is recorded, where memory is short: what they keep and give back."""

import gc
import weakref
from dataclasses import replace

import emulated_gpu
import pytest
import torch
from test_cuda_every_architecture import NEW
from test_graph_answers import GREEDY, PROMPTS, alone, answer, folders, in_turns, stepper_of

from gptq_webui.core.chat import Step
from gptq_webui.gptq import graph_rows, graph_stepper
from gptq_webui.gptq.static_rows import Row

pytestmark = NEW
__all__ = ["folders", "stepper_of"]


def test_a_full_gpu_lets_answers_take_turns(stepper_of, monkeypatch):
    """Where rows would grow there is no room any more: nothing is lost, and nobody's answer ends."""
    monkeypatch.setattr(graph_rows, "FIRST_CAPACITY", 16)
    stepper, params = stepper_of(), replace(GREEDY, max_new_tokens=30)
    wanted = [alone(stepper, ids, params) for ids in PROMPTS[:3]]
    room, full = graph_rows.RowRoom, []

    def one_of_small_ones(memory, rows, capacity):
        if capacity > 16:
            full.append(capacity)
            raise torch.OutOfMemoryError("full")
        return room(memory, rows, capacity)

    monkeypatch.setattr(graph_rows, "RowRoom", one_of_small_ones)
    assert in_turns([answer(stepper, ids, params) for ids in PROMPTS[:3]]) == wanted
    assert full


def test_an_answer_that_fails_leaves_the_others_as_they_were(stepper_of, monkeypatch):
    stepper = stepper_of()
    wanted = [alone(stepper, ids) for ids in PROMPTS[:3]]
    compute, step, calls = stepper._rows.step, stepper.step, []

    def full(rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return compute(rows)

    def failing(memory, id):
        calls.append(id)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("full")
        return step(memory, id)

    monkeypatch.setattr(stepper._rows, "step", full)
    monkeypatch.setattr(stepper, "step", failing)
    answers = [answer(stepper, ids) for ids in PROMPTS[:3]]
    found, ended = [[], [], []], []
    for _turn in range(40):
        for at, each in enumerate(answers):
            try:
                event = next(each, None)
            except torch.OutOfMemoryError:
                ended.append(at)
                continue
            if isinstance(event, Step):
                found[at].append(event.id)
    assert len(ended) == 1
    assert [mine for at, mine in enumerate(found) if at != ended[0]] == [each for at, each in enumerate(wanted) if at != ended[0]]


def test_a_conversation_stays_in_its_row_where_there_is_no_room_beside(stepper_of, monkeypatch):
    stepper = stepper_of(parallel=2)
    with torch.inference_mode():
        memory, other = stepper.begin(), stepper.begin()
        stepper.prefill(memory, PROMPTS[0])
        stepper.prefill(other, PROMPTS[1])
        stepper._rows.logits([(memory, 3), (other, 4)])
        keys = memory.elsewhere._room.layers[0].keys
        clone, left = torch.Tensor.clone, [3]

        def full(self, *given, **how):
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("full")
            return clone(self, *given, **how)

        monkeypatch.setattr(torch.Tensor, "clone", full)
        with pytest.raises(torch.OutOfMemoryError):
            _ = memory.cache
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        assert isinstance(memory.elsewhere, Row)
        held = [memory.layers[at].keys.shape[2] for at in range(len(memory.layers))]
        assert set(held) == {memory.length} and keys.shape[2] > memory.length


def test_rooms_are_freed_at_once(stepper_of):
    stepper = stepper_of(parallel=2)
    in_turns([answer(stepper, ids) for ids in PROMPTS[:2]])
    gc.disable()
    try:
        tensor = weakref.ref(stepper._rows._room.layers[0].keys)
        with torch.inference_mode():
            stepper._rows.clear()
        assert tensor() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("kind", "how", "left"), [("mamba2", {}, 1), ("llama", {"free": 1000}, 1), ("llama", {}, 2)])
def test_what_is_opened_for_rows_is_closed(stepper_of, monkeypatch, kind, how, left):
    opened, closed = [], []
    begin = emulated_gpu.Recorder.__init__
    monkeypatch.setattr(emulated_gpu.Recorder, "__init__", lambda self, device: opened.append(self) or begin(self, device))
    monkeypatch.setattr(emulated_gpu.Recorder, "close", lambda self: closed.append(self))
    stepper = stepper_of(kind, **how)
    assert len(opened) - len(closed) == left
    stepper.close()
    assert set(opened) == set(closed)


def test_rows_give_their_memory_to_an_answer_that_is_alone(stepper_of, monkeypatch):
    monkeypatch.setattr(graph_rows, "FIRST_CAPACITY", 16)
    stepper, params = stepper_of(), replace(GREEDY, max_new_tokens=30)
    wanted = alone(stepper, PROMPTS[0], params)
    in_turns([answer(stepper, ids) for ids in PROMPTS[:2]])
    graph, prefill = graph_stepper.GraphStepper._graph, graph_stepper.GraphStepper.prefill

    def full(compute):
        def computed(self, *given):
            if stepper._rows.holds_memory:
                raise torch.OutOfMemoryError("full")
            return compute(self, *given)

        return computed

    monkeypatch.setattr(graph_stepper.GraphStepper, "_graph", full(graph))
    assert alone(stepper, PROMPTS[0], params) == wanted and not stepper.why
    in_turns([answer(stepper, ids) for ids in PROMPTS[:2]])
    monkeypatch.setattr(graph_stepper.GraphStepper, "prefill", full(prefill))
    assert alone(stepper, PROMPTS[0], params) == wanted
