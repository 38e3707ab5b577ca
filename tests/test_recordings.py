"""While graphs are recorded: Python's garbage (collector.py), and what is asked of a counter (recording.py). Without a GPU."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from test_transformers_stepper import IDS, Replay, error, tiny_model, whole

from gptq_webui.gptq import graph_stepper
from gptq_webui.gptq.collector import without_collector
from gptq_webui.gptq.graph_stepper import FIRST_CAPACITY, GraphStepper
from gptq_webui.gptq.recording import Counted, NumbersMadeThere


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, found):
        self.found, self.itself = found, self

    def __del__(self):
        self.found.append(True)


def much():
    """So many objects that Python collects on its own."""
    return [[each] for each in range(100_000)]


@pytest.fixture(autouse=True)
def collected_afterwards():
    gc.collect()
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_nothing_is_collected_in_a_recording_and_everything_after_it():
    found = []
    Cycle(found)
    kept = much()
    assert found, "what is made here begins a collection"
    found.clear()
    with without_collector():
        Cycle(found)
        kept += much()
        assert not found
    kept += much()
    assert found


def test_a_recording_that_fails_leaves_collections_on():
    with pytest.raises(ZeroDivisionError), without_collector():
        raise ZeroDivisionError


def test_collections_begin_again_after_the_last_of_several_recordings():
    begun, end = threading.Event(), threading.Event()

    def other():
        with without_collector():
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    with without_collector():
        pass
    assert not gc.isenabled(), "another thread records"
    end.set()
    thread.join()


def test_who_has_turned_collections_off_finds_them_off():
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("question", "answer"), [
    (lambda n: n > 0, True), (lambda n: n + 1 < 2, False), (lambda n: 1 - (n + 1) > 0, False), (lambda n: 5 - n <= 4, True),
    (lambda n: (3 + n) - 2 >= 2, True), (lambda n: n == 101, False), (lambda n: n + n != 3, True), (lambda n: n > 100, False),
    (lambda n: max(0, 1 - n) == 0, True), (lambda n: n + 3 < 102 + 2, True), (lambda n: n - n == 0, True),
])  # fmt: skip
def test_a_question_with_one_answer_is_not_asked_of_the_gpu(question, answer):
    count = torch.zeros(1, dtype=torch.long, device="meta")  # it has no value to be asked for
    with NumbersMadeThere(Counted(count, 1, 100)):
        assert bool(question(count[0])) is answer


@pytest.mark.parametrize("question", [lambda n: n > 50, lambda n: 60 - n < 0, lambda n: n == 7, lambda n: n + 1 != 2])
def test_a_question_whose_answer_changes_is_refused_before_the_gpu_is_asked(question):
    count = torch.tensor([80])
    with NumbersMadeThere(Counted(count, 1, 100)), pytest.raises(RuntimeError, match="depends on how many tokens"):
        bool(question(count[0]))


@pytest.mark.parametrize("question", [lambda n: n * 2 > 2, lambda n: n.clone() > 3])
def test_of_what_is_no_sum_the_tensor_is_asked(question):
    for tokens in (1, 80):
        count = torch.tensor([tokens])
        with NumbersMadeThere(Counted(count, 1, 100)):
            assert bool(question(count[0])) is (tokens > 1)


@pytest.mark.parametrize("change", [
    lambda found: found.logical_not_(), lambda found: found.fill_(False), lambda found: found.__iand__(torch.tensor(False)),
    lambda found: found.__setitem__((), False), lambda found: torch.zeros((), dtype=torch.bool, out=found),
    lambda found: torch.logical_not(found, out=found),
])  # fmt: skip
def test_an_answer_that_is_changed_in_place_is_known_no_more(change):
    counter = torch.tensor([3])
    with NumbersMadeThere(Counted(counter, 1, 100)):
        found = counter[0] > 0
        assert bool(found)
        change(found)
        assert not bool(found)


def test_a_sum_that_is_changed_in_place_is_known_no_more():
    counter = torch.tensor([3])
    known = Counted(counter, 1, 100)
    with NumbersMadeThere(known):
        total = counter[0] + 1
        assert len(known._sums) == 2
        total += 5
        assert len(known._sums) == 1 and int(total) == 9


def test_ones_of_all_tokens_and_numbers_from_the_counter_on_are_made_there():
    counter = torch.tensor([7])
    with NumbersMadeThere(Counted(counter, 1, 20)):
        n = counter[0]
        ones, halves = torch.ones(2, n + 1), torch.ones((3, n), dtype=torch.float16)
        assert ones.shape == (2, 21) and ones.dtype == torch.float32 and bool((ones[:, :8] == 1).all() and not ones[:, 8:].any())
        assert halves.shape == (3, 20) and halves.dtype == torch.float16 and halves.sum() == 21
        assert torch.equal(torch.arange(n, n + 3, dtype=torch.long), torch.tensor([7, 8, 9]))
        assert torch.equal(torch.arange(n - 2, 1 + n), torch.tensor([5, 6, 7]))
        assert torch.equal(torch.ones(2, 3), torch.full((2, 3), 1.0)) and torch.equal(torch.arange(1, 3), torch.tensor([1, 2]))
        assert torch.arange(2, n).shape == (5,), "how many are not known: it is asked"
        assert torch.ones(1, 30 - n).shape == (1, 29) and torch.ones(1, 30 - n).sum() == 23, "as many as there can be"


@pytest.mark.parametrize("asks", [True, False])
def test_a_longer_graph_of_a_forward_that_asks_for_lengths_is_compared_with_the_forward_without_one(asks, monkeypatch):
    monkeypatch.setattr(graph_stepper.Counted, "asked", property(lambda _: asks, lambda *_: None), raising=False)

    class Wrong(Replay):
        def record(self, run):
            graph = super().record(run)
            if self.recorded == 1:
                return graph
            return SimpleNamespace(replay=lambda: (graph.replay(), stepper._logits.mul_(-1)))

    stepper = GraphStepper(tiny_model("llama", max_position_embeddings=4096), 4096, Wrong())
    stepper.trial()
    assert not stepper.why
    ids = (IDS * 30)[: FIRST_CAPACITY + 2]
    wanted = whole(stepper._model, ids)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, ids[: FIRST_CAPACITY - 1])
        for at in range(FIRST_CAPACITY - 1, FIRST_CAPACITY + 2):
            right = error(stepper.step(memory, ids[at]), wanted[at]) < 1e-4
            assert right or (not asks and at >= FIRST_CAPACITY), "with the graph, and without one"
    assert ("sees 2048 tokens gives other results" in stepper.why) is asks
