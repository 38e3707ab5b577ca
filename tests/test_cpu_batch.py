"""gptq/answer_batch.py: answers side by side, and guesses, give the tokens of an answer alone."""

import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numba")

from test_cpu import load

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import answer_batch
from gptq_webui.gptq.answer_batch import MOST_ROWS
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache

IDS = torch.randint(5, 260, (400,), generator=torch.Generator().manual_seed(0)).tolist()
PARAMS = [
    GenerationParams(temperature=0, max_new_tokens=40),
    GenerationParams(temperature=1.0, seed=7, max_new_tokens=33),
    GenerationParams(temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.1, max_new_tokens=40),
    GenerationParams(temperature=1.5, seed=2, max_new_tokens=25, dry_multiplier=0.8, logprobs=2),
    GenerationParams(temperature=0, max_new_tokens=40, min_tokens=10),
]
PROMPTS = [IDS[:9], IDS[9:60], IDS[60:61], IDS[70:120] * 3, IDS[120:170]]


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    hf, _twin = load(tmp_path_factory.mktemp("batch") / "model", "llama")
    stepper = CpuStepper(parts_of(hf), 600, 2, parallel=8)
    yield stepper
    stepper.close()


def events_of(stepper, prompt, params, cancel=None, prefix=None):
    return generate(
        stepper,
        prompt,
        params,
        cancel or threading.Event(),
        prefix=prefix or PrefixCache(),
        end_ids=(),
        context_tokens=600,
    )


def ids_of(events):
    return [each.id for each in events if hasattr(each, "id")]


def in_turns(iterators):
    """The ids of each, an event of each in turns."""
    found = [[] for _ in iterators]
    running = dict(enumerate(iterators))
    while running:
        for at in list(running):
            event = next(running[at], StopIteration)
            if event is StopIteration:
                del running[at]
            elif hasattr(event, "id"):
                found[at].append(event.id)
    return found


def passes(stepper, monkeypatch):
    """The rows of each pass that computes logits for all of them."""
    rows = []
    compute = stepper._batch._compute

    def counted(pieces):
        rows.append(sum(len(ids) for _memory, ids in pieces))
        return compute(pieces)

    monkeypatch.setattr(stepper._batch, "_compute", counted)
    return rows


def test_rows_of_several_conversations_get_the_logits_of_single_steps(stepper):
    with torch.inference_mode():
        pieces, wanted = [], []
        for at, length in enumerate((1, 17, 300, 5)):
            memory = stepper.begin()
            stepper.prefill(memory, IDS[:length])
            new = IDS[length : length + 1 + at]
            alone = memory.fork(length)
            wanted += [stepper.step(alone, id).clone() for id in new]
            pieces.append((memory, new))
        found = stepper.rows_logits(pieces)
        assert torch.equal(found, torch.cat(wanted))
        assert [memory.length for memory, _ids in pieces] == [2, 19, 303, 9]
        with pytest.raises(ValueError, match="17 rows"):
            stepper.rows_logits([(stepper.begin(), [1] * (MOST_ROWS + 1))])


def test_answers_in_turns_are_those_of_answers_alone(stepper, monkeypatch):
    alone = [ids_of(events_of(stepper, prompt, params)) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    rows = passes(stepper, monkeypatch)
    together = in_turns([events_of(stepper, prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)])
    for found, wanted in zip(together, alone, strict=True):
        assert found == wanted
    assert [len(each) for each in alone] == [40, 33, 40, 25, 40]
    assert max(rows) >= 5 and len(rows) <= 45  # they were computed together
    assert not stepper._batch.busy


def test_answers_that_come_and_go_disturb_nobody(stepper):
    wanted = ids_of(events_of(stepper, PROMPTS[1], PARAMS[1]))
    first = events_of(stepper, PROMPTS[1], PARAMS[1])
    found, others, cancel = [], [], threading.Event()
    for turn in range(80):
        event = next(first, None)
        if hasattr(event, "id"):
            found.append(event.id)
        if turn in (3, 5, 9):
            others.append(events_of(stepper, PROMPTS[turn % 4], PARAMS[turn % 3], cancel))
        if turn == 14:
            others[0].close()
        if turn == 18:
            cancel.set()
        for each in others:
            next(each, None)
    assert found == wanted and not stepper._batch.busy


def test_torch_gets_its_threads_back_whatever_the_order_of_the_ends(stepper):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two = (events_of(stepper, PROMPTS[0], PARAMS[at]) for at in (0, 1))
        for each in (one, two):
            while not hasattr(next(each), "id"):
                pass
        assert torch.get_num_threads() == 1
        one.close()
        assert torch.get_num_threads() == 1
        two.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("params", PARAMS[:4])
def test_guesses_change_no_token(stepper, monkeypatch, params):
    """Of a tiny random model most answers fall into a loop, which is guessed; the first are cut off again and again."""
    for prompt in PROMPTS[1:4]:
        with monkeypatch.context() as patch:
            patch.setattr("gptq_webui.gptq.guessing.Guesser.guess", lambda self, costs: [])
            wanted = ids_of(events_of(stepper, prompt, params))
        with monkeypatch.context() as patch:
            patch.setattr("gptq_webui.gptq.guessing.Guesser.guess", wild)
            prefix = PrefixCache()
            assert ids_of(events_of(stepper, prompt, params, prefix=prefix)) == wanted
        (kept,) = prefix._kept
        assert len(prompt) + len(wanted) - kept.memory.length in (0, 1)  # 0: the last token was guessed
        assert kept.ids == [*prompt, *wanted][: kept.memory.length]


def wild(self, costs):
    """Sometimes right, sometimes wrong, as many as there is room for."""
    return [(self._ids[-1] * 7 + at) % 260 if len(self._ids) % 3 else self._ids[self._at] for at in range(1, len(costs))]


def paced(stepper, monkeypatch, row_more):
    """Let each row more take so many passes of one row, by the clock that guesses are judged by. Returns the rows of each pass.

    What earlier tests measured is forgotten meanwhile.
    """
    batch, rows, now = stepper._batch, passes(stepper, monkeypatch), [0.0]
    compute = batch._compute

    def timed(pieces):
        now[0] += 1 + row_more * (sum(len(ids) for _memory, ids in pieces) - 1)
        return compute(pieces)

    monkeypatch.setattr(batch, "_compute", timed)
    monkeypatch.setattr(batch, "_one_s", None)
    monkeypatch.setattr(batch, "_row_cost", answer_batch._ROW_COST)
    monkeypatch.setattr(answer_batch, "perf_counter", lambda: now[0])
    return rows


def test_an_answer_that_repeats_itself_takes_fewer_passes(stepper, monkeypatch):
    rows = paced(stepper, monkeypatch, 0.3)
    ids = ids_of(events_of(stepper, IDS[:5], GenerationParams(temperature=0, max_new_tokens=200)))
    loop = next(length for length in range(1, 60) if ids[-length * 2 : -length] == ids[-length:])
    assert loop < 60  # else this model shows nothing
    assert len(rows) < 150


def test_where_rows_are_dear_the_same_answer_is_soon_computed_without_guesses(stepper, monkeypatch):
    rows = paced(stepper, monkeypatch, 1.5)
    assert len(ids_of(events_of(stepper, IDS[:5], GenerationParams(temperature=0, max_new_tokens=200)))) == 200
    assert sum(rows) - len(rows) < 40  # guesses in all
    assert max(rows[-20:]) <= 2


def test_a_guess_never_reaches_past_the_context(stepper, monkeypatch):
    monkeypatch.setattr("gptq_webui.gptq.guessing.Guesser.guess", wild)
    longest = []
    compute = stepper._batch._compute
    monkeypatch.setattr(
        stepper._batch, "_compute", lambda pieces: (longest.append(pieces[0][0].length + len(pieces[0][1])), compute(pieces))[1]
    )
    ids = ids_of(events_of(stepper, IDS[:395], GenerationParams(temperature=0, max_new_tokens=500)))
    assert len(ids) == 205 and max(longest) <= 600


def test_a_prompt_is_read_in_smaller_pieces_while_others_answer(stepper, monkeypatch):
    monkeypatch.setattr(stepper._turns, "tokens", 32)
    monkeypatch.setattr(stepper._turns, "measured", lambda tokens, seconds: None)
    running = events_of(stepper, PROMPTS[0], PARAMS[0])
    while not hasattr(next(running), "id"):
        pass
    pieces = []
    other = generate(
        stepper,
        IDS[:100],
        PARAMS[0],
        threading.Event(),
        prefix=PrefixCache(),
        end_ids=(),
        context_tokens=600,
        progress=pieces.append,
    )
    while not hasattr(next(other), "id"):
        pass
    running.close()
    other.close()
    assert pieces == [32, 64, 96, 100]


def test_more_answers_than_rows_of_a_pass_share_the_time(stepper):
    """Each is what it is alone, and none is a token ahead of another when all are sampled."""
    params = [replace(PARAMS[at % 4], max_new_tokens=30, seed=at) for at in range(40)]
    prompts = [IDS[at : at + 5 + at % 9] for at in range(40)]
    alone = [ids_of(events_of(stepper, prompt, each)) for prompt, each in zip(prompts, params, strict=True)]
    assert in_turns([events_of(stepper, prompt, each) for prompt, each in zip(prompts, params, strict=True)]) == alone
    running = [events_of(stepper, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    counts = [0] * 40
    for _round in range(200):
        for at, each in enumerate(running):
            counts[at] += hasattr(next(each, None), "id")
        if min(counts):
            apart = max(counts) - min(counts)  # by when their prompts were read
            break
    for _round in range(5):
        for at, each in enumerate(running):
            counts[at] += hasattr(next(each), "id")
    assert max(counts) - min(counts) == apart
    for each in running:
        each.close()
    assert not stepper._batch.busy


def test_prompts_that_come_together_are_read_by_turns_beside_a_stream(stepper, monkeypatch):
    monkeypatch.setattr(stepper._turns, "tokens", 32)
    monkeypatch.setattr(stepper._turns, "measured", lambda tokens, seconds: None)
    stream = events_of(stepper, PROMPTS[0], replace(PARAMS[0], max_new_tokens=500))
    while not hasattr(next(stream), "id"):
        pass
    read = [0] * 12
    others = [
        generate(
            stepper, IDS[at : at + 100], PARAMS[0], threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=600,
            progress=partial(read.__setitem__, at),
        )
        for at in range(12)
    ]  # fmt: skip
    short = events_of(stepper, IDS[7:20], PARAMS[0])
    for turn in range(200):
        assert hasattr(next(stream), "id")
        before = sum(read)
        if turn == 3:
            others.append(short)
        events = [next(each) for each in others]
        assert sum(read) - before <= 48  # 32, or half as much again where many wait
        if turn > 3 and hasattr(events[-1], "id"):
            assert turn < 16  # after a piece of each that came before; all of them take 25 rounds
            break
    for each in (stream, *others):
        each.close()
    assert not stepper._turns._waiting


@pytest.mark.parametrize(("free", "asked", "found"), [(1 << 40, 256, 64), (1 << 20, 256, 8), (1 << 40, 3, 3), (1 << 20, 3, 3)])
def test_more_than_a_few_answers_at_once_if_their_conversations_fit(tmp_path, monkeypatch, free, asked, found):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    hf, _twin = load(tmp_path / "model", "llama")
    made = CpuStepper(parts_of(hf), 600, 1, parallel=asked)
    made.close()
    assert made.parallel == found
