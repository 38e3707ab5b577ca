"""Divided over two ranks, a step begins with a token that no host knows yet: the others have it from the first rank.

The ranks are threads here, and what was recorded is run again in the place of a graph."""

import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import pytest
import torch
from test_transformers_stepper import Replay

import tiny
from gptq_webui.core.errors import AnswerFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.begun_ahead import BegunAhead
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.parallel import model_share
from gptq_webui.gptq.parallel.divided_layers import sum_outputs
from gptq_webui.gptq.parallel.rank_group import RankGroup
from gptq_webui.gptq.parallel.rank_process import _do
from gptq_webui.gptq.parallel.rank_stepper import LeadingStepper, RankStepper, with_ids_of_first

CPU = torch.device("cpu")
IDS = [5, 9, 200, 7, 3, 8, 4, 6, 31, 2]
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
SAMPLED = GenerationParams(temperature=1.0, top_p=0.9, seed=4, ignore_eos=True)


class Orders:
    """In the place of Ranks: what the other rank was told."""

    def __init__(self, group):
        self.waiting, self.every, self.why, self._memories, self._group = queue.SimpleQueue(), [], "", 0, group

    @property
    def alive(self):
        return not self.why

    def order(self, do, memory=0, **values):
        if self.why:
            raise AnswerFailed(self.why)
        self.every.append({"do": do, "memory": memory, "forget": [], **values})
        self.waiting.put(self.every[-1])

    def new_memory(self):
        self._memories += 1
        return self._memories

    def forget(self, memory):
        pass

    def settle(self):
        pass

    def lose(self, why=""):
        self.why = why or "A rank is gone."
        self.waiting.put(None)

    def close(self):
        self.waiting.put(None)


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model", seed=3)


def both(folder, work):
    """(what `work(leading stepper, orders)` gives, what the other rank got)."""
    groups = [RankGroup(number, 2) for number in range(2)]
    orders = Orders(groups[0])

    def own(number):
        hf, _notes = model_share.load(LocalModel.read(folder / "model"), groups[number], dtype=torch.float32, device=CPU)
        sum_outputs(hf, groups[number])
        groups[number].join(folder, CPU)
        plain = RankStepper(hf)
        plain.run_model = with_ids_of_first(plain.run_model, groups[number])
        graph = GraphStepper(hf, 256, Replay(), None, plain)
        graph.trial()
        graph.may_give_up = False
        return hf, graph

    def first():
        with torch.inference_mode():
            hf, graph = own(0)
            stepper = LeadingStepper(graph, hf.config, groups[0], orders, lambda: None)
            try:
                return work(stepper, orders)
            finally:
                stepper.close()

    def second():
        with torch.inference_mode():
            _hf, graph = own(1)
            memories = {}
            while (order := orders.waiting.get(timeout=60)) is not None:
                _do(graph, memories, **order)
            graph.close()
            groups[1].close()

    with ThreadPoolExecutor(2) as pool:
        found, other = pool.submit(first), pool.submit(second)
        result = found.result(120)
        other.result(120)
    return result, orders.every


def answer(stepper, memory, logits, ids, params, count):
    with closing(stepper.sample(memory, logits, ids, params)) as steps:
        return [each.id for each in islice(steps, count)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_tokens_are_those_of_steps_that_wait(tmp_path, model, params):
    def work(stepper, _orders):
        memory = stepper.begin()
        ahead = answer(stepper, memory, stepper.prefill(memory, IDS), IDS, params, 12)
        length = memory.length
        more = [*IDS, *ahead[:5]]
        assert memory.cut(len(more) - 1)
        again = answer(stepper, memory, stepper.prefill(memory, more[-1:]), more, GREEDY, 8)
        waits = stepper.begin()
        logits, found = stepper.prefill(waits, IDS), []
        for id in ahead:
            found.append(logits.argmax().item())
            logits = stepper.step(waits, id)
        return ahead, length, again, found

    (ahead, length, again, found), given = both(tmp_path, work)
    assert len(ahead) == 12 and length == len(IDS) + 11  # what was begun after the last token is taken back
    steps = [each["ids"] for each in given if each["do"] == "step"]
    assert steps[:11] == [[0]] * 11 and steps[-12:] == [[each] for each in ahead]
    if params is GREEDY:
        assert found == ahead and again == ahead[5:12] + again[7:]


def test_the_twin_would_say_the_same(tmp_path, model):
    def work(stepper, _orders):
        memory = stepper.begin()
        logits = stepper.prefill(memory, IDS)
        running = stepper.running(memory, IDS)
        assert isinstance(running, BegunAhead)
        running.close()
        return answer(stepper, memory, logits, IDS, GREEDY, 16)

    found, _given = both(tmp_path, work)
    with torch.inference_mode():
        logits = model(torch.tensor([[*IDS, *found]])).logits[0, len(IDS) - 1 : -1]
    for id, each in zip(found, logits, strict=True):
        best, second = each.topk(2).values.tolist()
        if best - second < 1e-3:
            break
        assert id == int(each.argmax())


def test_a_token_that_misses_a_rank_ends_the_answer_with_a_sentence(tmp_path, model, monkeypatch):
    from gptq_webui.gptq.parallel.rank_group import Parted

    missed = []

    def gone(_group):
        if missed:
            raise Parted("another rank did not come to a sum")

    monkeypatch.setattr(RankGroup, "require_sums", gone)

    def work(stepper, orders):
        memory = stepper.begin()
        logits = stepper.prefill(memory, IDS)
        with closing(stepper.sample(memory, logits, IDS, GREEDY)) as steps:
            next(steps)
            missed.append(True)
            with pytest.raises(AnswerFailed, match=r"A rank is gone\."):
                list(islice(steps, 3))
        return orders.why

    why, _given = both(tmp_path, work)
    assert why == "A rank is gone."


def test_a_known_token_is_waited_for(tmp_path, model, monkeypatch):
    """With log-probabilities nobody asks later whether every rank came."""
    waited = []

    def work(stepper, _orders):
        memory = stepper.begin()
        logits = stepper.prefill(memory, IDS)
        monkeypatch.setattr(RankGroup, "require_all", lambda _group: waited.append(True))
        params = GenerationParams(temperature=0.0, ignore_eos=True, logprobs=2)
        return answer(stepper, memory, logits, IDS, params, 6)

    found, given = both(tmp_path, work)
    assert len(found) == len(waited) == 6
    assert [each["ids"] for each in given if each["do"] == "step"][-6:] == [[id] for id in found]


def test_an_answer_that_ends_after_a_rank_is_gone_is_no_failure(tmp_path, model):
    def work(stepper, orders):
        memory = stepper.begin()
        steps = stepper.sample(memory, stepper.prefill(memory, IDS), IDS, GREEDY)
        next(steps)
        orders.lose()
        steps.close()
        return memory.length

    length, _given = both(tmp_path, work)
    assert length == len(IDS)
