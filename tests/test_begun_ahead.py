"""gptq/begun_ahead.py and the tokens that are drawn without waiting: `generate` begins a token before the host knows it."""

from contextlib import closing, nullcontext
from itertools import islice

import pytest
import torch
import transformers

pytest.importorskip("numba")
from test_patched_forward import PROMPT, generate
from test_sampling_loop import Look, loops, model  # noqa: F401
from test_transformers_stepper import graph, tiny_model
from transformers import LogitsProcessorList

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.attention_backends import cudnn_attention
from gptq_webui.gptq.begun_ahead import BegunAhead
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.sampling_loop import Draw
from gptq_webui.gptq.stepper import Stepper


@pytest.fixture
def begun(model, monkeypatch):  # noqa: F811
    """The next token is begun before the host asks for this one, as on a GPU; a list of how long the memory was then."""
    lengths = []

    def running(memory, ids):
        def step(id):
            lengths.append(memory.length)
            return model.stepper.step(memory, int(id))

        return BegunAhead(memory, step, torch.device("cpu"))

    monkeypatch.setattr(model.stepper, "running", running)
    return lengths


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20}], ids=str)
def test_tokens_that_are_begun_before_they_are_known_are_the_twins(model, loops, begun, settings):  # noqa: F811
    torch.manual_seed(5)
    found = generate(model.hf, PROMPT, 40, **settings)
    torch.manual_seed(5)
    assert found.tolist() == generate(model.twin, PROMPT, 40, **settings).tolist()
    assert len(begun) == loops[0] - 1, "nothing is computed after the last token"


@pytest.mark.parametrize("ends", ["an end token", "a criterion", "a criterion that fails"])
def test_what_was_begun_after_the_last_token_is_taken_back(model, loops, begun, ends):  # noqa: F811
    class Stop(Exception):
        pass

    def fails_at_nine(ids, _scores):
        if ids.shape[1] == PROMPT.shape[1] + 9:
            raise Stop
        return torch.zeros(1, dtype=torch.bool)

    answer = generate(model.twin, PROMPT, 9)
    given = {
        "an end token": {"eos_token_id": [answer[0, -1].item()]}, "a criterion": {"stopping_criteria": [Look(9)]},
        "a criterion that fails": {"stopping_criteria": [fails_at_nine]},
    }[ends]  # fmt: skip
    model.prefix.clear()
    with pytest.raises(Stop) if ends == "a criterion that fails" else nullcontext():
        assert generate(model.hf, PROMPT, 40, **given).tolist() == answer[:, : PROMPT.shape[1] + loops[0]].tolist()
    assert len(begun) == (9 if ends == "an end token" else 8), "nothing is begun once a criterion has ended the answer"
    held, length = model.prefix.take([*answer[0].tolist(), 70, 71])
    assert held.length == length <= answer.shape[1] - 1
    model.same(ids=PROMPT)


def test_a_step_that_finds_no_memory_before_it_is_needed_fails_only_if_it_is(model, begun, monkeypatch):  # noqa: F811
    step, failing = model.stepper.step, []

    def full(memory, id):
        if memory.length >= PROMPT.shape[1] + 8:
            failing.append(memory.length)
            raise torch.OutOfMemoryError("full")
        return step(memory, id)

    monkeypatch.setattr(model.stepper, "step", full)
    answer = generate(model.twin, PROMPT, 9)
    end = answer[0, -1].item()
    assert end not in answer[0, PROMPT.shape[1] : -1]
    found = generate(model.hf, PROMPT, 40, eos_token_id=[end])
    assert found.tolist() == answer.tolist() and len(failing) == 1
    assert generate(model.hf, PROMPT, 40, stopping_criteria=[Look(9)]).tolist() == answer.tolist()
    assert len(failing) == 1, "a criterion that sees the ids is asked before the next step is begun"
    with pytest.raises(torch.OutOfMemoryError):
        generate(model.hf, PROMPT, 40)
    monkeypatch.undo()
    model.same(ids=PROMPT)


@pytest.mark.parametrize("vocabulary", [2, 300, 50_001])
def test_a_token_is_drawn_as_multinomial_draws_it(vocabulary):
    draw, random = Draw(), torch.Generator().manual_seed(3)
    for seed in range(50):
        scores = torch.randn(1, vocabulary, generator=random) * 3
        scores[torch.rand(1, vocabulary, generator=random) < 0.5] = -float("inf")
        scores[0, seed % vocabulary] = 1.0
        torch.manual_seed(seed)
        wanted = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        torch.manual_seed(seed)
        assert draw.of(scores).tolist() == wanted.tolist()
        draw.check()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_is_drawn_from_scores_that_are_no_numbers(model, loops, wrong):  # noqa: F811
    def spoil(_ids, scores):
        scores[0, 77] = wrong
        return scores

    with pytest.raises(RuntimeError, match="no token can be sampled"):
        generate(model.hf, PROMPT, 5, do_sample=True, logits_processor=LogitsProcessorList([spoil]))
    model.same(ids=PROMPT)


def graph_stepper(kind):
    stepper = graph(tiny_model(kind))
    assert not stepper.why
    return stepper


def answered(stepper, params, count, memory=None):
    """(the first `count` ids of an answer, the memory) by the sampler of every stepper."""
    memory = stepper.begin() if memory is None else memory
    prompt = PROMPT[0].tolist()
    with torch.inference_mode():
        logits = stepper.prefill(memory, prompt)
        with closing(stepper.sample(memory, logits, prompt, params)) as steps:
            return [each.id for each in islice(steps, count)], memory


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "seed": 5}, {"temperature": 1.0, "min_p": 0.1, "seed": 6}],
    ids=str,
)
def test_a_graphs_answer_is_begun_ahead_and_is_the_same(settings, monkeypatch):
    params = GenerationParams(**settings)
    stepper = graph_stepper("llama")
    begun, begin = [], BegunAhead.begin
    monkeypatch.setattr(BegunAhead, "begin", lambda self, token: begun.append(1) or begin(self, token))
    found, memory = answered(stepper, params, 30)
    assert len(begun) == 30
    assert memory.length == PROMPT.shape[1] + 29, "what was begun after the last token is taken back"
    monkeypatch.setattr(GraphStepper, "running", Stepper.running)
    again, other = answered(stepper, params, 30)
    assert found == again and other.length == memory.length and len(begun) == 30
    with torch.inference_mode():
        pair = [stepper.step(each, 77).clone() for each in (memory, other)]
    torch.testing.assert_close(*pair)


def test_log_probabilities_and_states_are_not_begun_ahead(monkeypatch):
    def never(self, token):
        raise AssertionError("begun")

    monkeypatch.setattr(BegunAhead, "begin", never)
    stepper = graph_stepper("llama")
    answered(stepper, GenerationParams(temperature=0.0, logprobs=2), 5)
    if transformers.__version__ >= "5":
        hybrid = graph_stepper("qwen3_next")
        answered(hybrid, GenerationParams(temperature=0.0), 5)


def test_a_graph_that_others_count_on_does_not_go_on_without():
    stepper = graph_stepper("llama")
    stepper.may_give_up = False

    class Full(RuntimeError):
        pass

    def full(run):
        raise Full

    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, PROMPT[0].tolist())
        stepper.step(memory, 5)
        stepper._graphs.clear()
        stepper._recorder.record = full
        with pytest.raises(Full):
            stepper.step(memory, 6)
    assert not stepper.why


@pytest.mark.parametrize("usual", [True, False])
def test_cudnn_is_as_it_was_once_nobody_keeps_from_it(usual, monkeypatch):
    state = [usual]
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: state[0])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: state.__setitem__(0, enabled))
    first, second = cudnn_attention(allowed=False), cudnn_attention(allowed=False)
    first.__enter__()
    second.__enter__()  # of another thread
    assert state == [False]
    with cudnn_attention(allowed=True):
        assert state == [usual]
    assert state == [False]
    first.__exit__(None, None, None)
    assert state == [False]
    second.__exit__(None, None, None)
    assert state == [usual]
