"""Guessed tokens on a GPU: rows of one sequence, and answers that are the same as without guesses. Skipped without a GPU."""

import random
import threading
from dataclasses import replace

import pytest
import torch
from test_cuda_batch_step import GREEDY, first_doubt, ids_of, solo
from test_cuda_step import SMALL, error, gpu, random_models  # noqa: F401 (a fixture)
from test_cuda_stepper import load

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda import answer_guesses
from gptq_webui.gptq.cuda.answer_guesses import AnswerGuesses
from gptq_webui.gptq.cuda.answer_rows import prepare_row
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.guessed_step import GuessedStep
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.loaders.transformers.transformers_loader import TransformersOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

PLAIN = GenerationParams(temperature=0, repetition_penalty=1)
CHANGES = [
    {},
    {"bits": 8, "q8": True},
    {"sym": False, "group_size": 32, "window": 40},
    {"head_dim": 128, "heads": 8, "window": 3},
    {"bias": True, "qk_norm": True},
]


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A loaded model that guesses, for one answer at a time or several."""
    model, twin = load(tmp_path, "llama", monkeypatch, TransformersOptions(guesses="on"))
    model._end_ids, model.template = set(), replace(model.template, stop_ids=())
    yield model, twin
    model.close()


def begun(gpu, change, length, text):  # noqa: F811
    """A step that has read the first `length` ids of a text; row 0 computes the next one."""
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **{k: v for k, v in change.items() if k != "q8"}})
    step = CudaStep(parts, 256, parallel=8, gpu=gpu, q8=change.get("q8", False), guesses=True)
    memory = PagedMemory(step.pages)
    step.sequences.use(memory, length + 16, step.sequences.prompt_row)
    step.prefill(text[:length], 0, step.sequences.prompt_row)
    step.sequences.use(memory, length + 16, 0)
    return step, memory


def from_text(step, text, length):
    """Row 0 is at the id after the first `length`, sampled greedily."""
    prepare_row(step.sequences, 0, text[: length + 1], PLAIN)
    step.sequences.ids[0] = text[length]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 60, 64, 150])
def test_rows_of_one_sequence_give_the_logits_of_plain_pytorch(gpu, change, length):  # noqa: F811
    torch.manual_seed(length)
    text = torch.randint(0, SMALL["vocabulary"], (length + 12,)).tolist()
    with torch.inference_mode():
        settings = {key: value for key, value in change.items() if key != "q8"}
        wanted = random_models.plain_logits(random_models.random_models(**{**SMALL, "group_size": 64, **settings}), text)
        torch.manual_seed(length)
        torch.randint(0, SMALL["vocabulary"], (length + 12,))
        step, _memory = begun(gpu, change, length, text)
        near = 3e-2 if "q8" in change else 1e-2
        for count in (1, 2, 3, 5, 7):
            from_text(step, text, length)
            step.guessed.step(length, text[length + 1 : length + 1 + count])
            torch.cuda.synchronize()
            for row in range(count + 1):
                assert error(step.sequences.logits[row], wanted[length + row]) < near, (count, row)
            assert step.sequences.positions[1:].tolist() == [-1] * 7
        from_text(step, text, length)  # what guesses have left in the pages is written over
        for at in range(4):
            step.sequences.ids[0], step.sequences.positions[0] = text[length + at], length + at
            step.step(sample_next=False)
            assert error(step.sequences.logits[0], wanted[length + at]) < near, at
        step.close()


def test_as_many_tokens_are_sampled_as_follow_from_right_guesses(gpu):  # noqa: F811
    torch.manual_seed(3)
    text = torch.randint(0, SMALL["vocabulary"], (50,)).tolist()
    with torch.inference_mode():
        step, _memory = begun(gpu, {}, 49, text)
        from_text(step, text, 49)
        mine = []
        for _ in range(9):
            step.step()
            mine.append(int(step.sequences.ids[0]))
        for right in range(8):
            guesses = mine[:7]
            if right < 7:
                guesses[right] = (guesses[right] + 1) % SMALL["vocabulary"]
            from_text(step, text, 49)
            step.guessed.step(49, guesses)
            torch.cuda.synchronize()
            assert step.guessed.sampled(49, 8) == mine[: right + 1], right
            assert int(step.sequences.positions[0]) == 50 + right and int(step.sequences.ids[0]) == mine[right]
            assert step.sequences.history[0, 50 : 51 + right].tolist() == mine[: right + 1]
        from_text(step, text, 49)
        step.guessed.step(49, mine[:1])
        torch.cuda.synchronize()
        assert step.guessed.sampled(49, 2) == mine[:2]
        costs = step.guessed.relative_costs(step.step)
        assert set(costs) == {2, 4, 8} and all(0.3 < each < 20 for each in costs.values())
        assert int(step.sequences.positions[0]) == 51 and int(step.sequences.ids[0]) == mine[1], "row 0 stays where it was"
        step.close()


class Oracle:
    """Guesses that are right, but for some."""

    matches = True

    def __init__(self, answer, prompt, wrong, seed=0):
        self._answer, self._prompt, self._wrong, self._ids, self._chance = answer, prompt, wrong, [], random.Random(seed)

    def __call__(self, ids):
        self._ids = list(ids)
        return self

    def add(self, id):
        self._ids.append(id)

    def guess(self, costs, after=0):
        at = len(self._ids) - self._prompt
        most = min(self._chance.randrange(8), len(costs) - 1)
        found = list(self._answer[at : at + after + most])
        return [id if self._chance.random() >= self._wrong else (id + 1) % 200 for id in found] if len(found) > after else []


ASKED = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.9, top_k=30, top_p=0.9, seed=5),
    "repeats": replace(GREEDY, temperature=0.8, repetition_penalty=1.3, repetition_range=9, seed=6),
    "counts": replace(GREEDY, presence_penalty=0.4, frequency_penalty=0.3),
    "typical": replace(GREEDY, temperature=1.0, typical_p=0.9, min_p=0.02, seed=7),
    "biased": replace(GREEDY, logit_bias=((9, 2.0),)),
}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("wrong", [0, 0.3, 1])
def test_an_answer_is_the_same_with_guesses_as_without(shared, monkeypatch, kind, wrong):
    model, twin = shared
    torch.manual_seed(len(kind))
    steps = []
    step = GuessedStep.step
    monkeypatch.setattr(GuessedStep, "step", lambda self, *args: steps.append(len(args[1])) or step(self, *args))
    different = 0
    for at in range(4):
        prompt = torch.randint(4, 288, (12 + 30 * at,)).tolist()
        params = replace(ASKED[kind], max_new_tokens=60)
        with monkeypatch.context() as without:
            without.setattr(AnswerGuesses, "ask", lambda self, answers, pending=(): None)
            mine = solo(model, prompt, params)
        monkeypatch.setattr(answer_guesses, "Guesser", Oracle(mine, len(prompt), wrong, at))
        steps.clear()
        found = solo(model, prompt, params)
        assert len(found) == len(mine) == 60
        if wrong == 0 and found == mine:
            assert steps and len(steps) <= 40, "right guesses save steps"
        if params.temperature == 0:
            sure = first_doubt(twin, prompt, mine, params)
            assert found[:sure] == mine[:sure]
        else:
            different += found != mine
    assert different <= 1


def test_answers_come_and_go_while_tokens_are_guessed(shared, monkeypatch):
    model, twin = shared
    prompts = [torch.randint(4, 288, (20 + at,)).tolist() for at in range(3)]
    with monkeypatch.context() as without:
        without.setattr(AnswerGuesses, "ask", lambda self, answers, pending=(): None)
        alone = [solo(model, each, GREEDY) for each in prompts]
    for seed in range(6):
        model._prefix.clear()
        flag = threading.Event()
        monkeypatch.setattr(answer_guesses, "Guesser", Oracle(alone[0], len(prompts[0]), 0.2, seed))
        first = model.generate(prompts[0], GREEDY, threading.Event())
        found = [next(first).id for _ in range(3 + seed)]
        second, third = (model.generate(each, GREEDY, flag) for each in prompts[1:])
        beside = [next(second).id, next(second).id]
        found += [next(first).id]
        flag.set()
        third.close()
        beside += ids_of(second)
        found += ids_of(first)
        sure = first_doubt(twin, prompts[0], alone[0], GREEDY)
        assert len(found) == 40 and found[:sure] == alone[0][:sure], seed
        sure = min(len(beside), first_doubt(twin, prompts[1], alone[1], GREEDY))
        assert beside[:sure] == alone[1][:sure], seed
    flag = threading.Event()
    cancelled = model.generate(prompts[0], replace(GREEDY, max_new_tokens=100), flag)
    next(cancelled)
    flag.set()
    assert list(cancelled)[-1].reason == "cancelled"
    monkeypatch.undo()
    assert solo(model, prompts[2], GREEDY)[:1] == alone[2][:1], "nothing is left of what was guessed"


def test_where_guesses_are_off_nothing_of_them_is_made(tmp_path, monkeypatch):
    model, _twin = load(tmp_path, "llama", monkeypatch, TransformersOptions(guesses="off"))
    assert model._stepper._answers._guesses is None and not model._stepper._step.gpu.has("sample_guessed")
    assert len(solo(model, [9] * 12, GREEDY)) == 40 and "guessed" not in vars(model._stepper._step)
    model.close()


def test_guesses_end_with_the_context(shared, monkeypatch):
    model, _twin = shared
    prompt = torch.randint(4, 288, (model.context_tokens - 11,)).tolist()
    with monkeypatch.context() as without:
        without.setattr(AnswerGuesses, "ask", lambda self, answers, pending=(): None)
        mine = solo(model, prompt, GREEDY)
    monkeypatch.setattr(answer_guesses, "Guesser", Oracle(mine, len(prompt), 0))
    assert len(solo(model, prompt, GREEDY)) == len(mine) == 11


def test_a_text_that_repeats_itself_takes_fewer_steps(shared, monkeypatch):
    """The model of the fixture writes what it writes; a bias on one token makes it repeat that."""
    model, _twin = shared
    repeating = replace(GREEDY, logit_bias=((9, 100.0),), max_new_tokens=60)
    steps = []
    step = GuessedStep.step
    monkeypatch.setattr(GuessedStep, "step", lambda self, *args: steps.append(len(args[1])) or step(self, *args))
    monkeypatch.setattr(AnswerGuesses, "_measure", lambda self: {2: 1.1, 4: 1.2, 8: 1.3})
    assert solo(model, [9] * 12, repeating) == [9] * 60
    assert steps and len(steps) <= 12
