"""tensor_parallel: a model that several processes compute together, on a processor; and what becomes of them at every end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.errors import AnswerFailed, GptqWebuiError, LoadCancelled, LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.parallel.ranks import Ranks
from gptq_webui.gptq.transformers_stepper import TransformersStepper
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

ON_TWO = TransformersOptions(device="cpu", tensor_parallel=2, context_tokens=1024)
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=48)
NEAR = 0.05  # between two logits: which of the two is sampled may depend on the order of sums


def load(folder: Path, options: TransformersOptions = ON_TWO, tell=lambda share, text: None):
    return TransformersLoader().load(LocalModel.read(folder), options, tell)


def rank_processes(of: int | None = None) -> list[psutil.Process]:
    """Those that compute a part of a model for this process, or for another one."""
    found = []
    for each in psutil.Process(of).children(recursive=True):
        try:
            if any("rank_process" in part for part in each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    return found


def wait_until(done, limit_s: float = 90.0) -> None:
    until = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def ids_of(loaded, prompt: list[int], params: GenerationParams = GREEDY) -> list[int]:
    return [each.id for each in loaded.generate(prompt, params, threading.Event()) if isinstance(each, Step)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with more weights than a rank has, and words."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(path, seed=3)
    tiny.write_tokenizer(path)
    return path


# the demo model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folder(demo_root):
    return next(path for path in sorted(demo_root.iterdir()) if "4bit" in path.name)


@pytest.fixture(scope="module")
def alone(demo_folder):
    """The whole model by transformers' forward and our layers in plain PyTorch."""
    hf, _notes = checkpoint.load(LocalModel.read(demo_folder), dtype=torch.float32, device_map={"": "cpu"})
    return TransformersStepper(hf)


@pytest.fixture(scope="module")
def divided(demo_folder):
    loaded = load(demo_folder)
    yield loaded
    loaded.close()
    assert rank_processes() == []


PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "def fibonacci(n):\n    ",
)


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_one_process(divided, alone, text):
    prompt = divided.encode(text)
    found = ids_of(divided, prompt)
    assert len(found) > 10
    with torch.inference_mode():
        memory = alone.begin()
        logits = alone.prefill(memory, prompt)
        for at, id in enumerate(found):
            best, second = logits[0].topk(2).values.tolist()
            if best - second < NEAR:
                assert at > 2 or id in logits[0].topk(2).indices
                return
            assert id == int(logits.argmax()), f"token {at}"
            logits = alone.step(memory, id)


def test_log_probabilities_are_those_of_one_process(divided, alone):
    ids = divided.encode(PROMPTS[1] + " lived in a house by the sea, and every morning she went down to the water.")
    events = divided.score(ids, 2, threading.Event())
    found = torch.tensor([each.logprob for each in events if not isinstance(each, Finish)][1:])
    with torch.inference_mode():
        logits = alone.all_logits(alone.begin(), ids)
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (found - wanted).norm() / wanted.norm() < 1e-3


def test_a_conversation_that_begins_alike_is_continued(divided, alone):
    first = divided.encode(PROMPTS[1])
    answer = ids_of(divided, first)
    longer = [*first, *answer, *divided.encode(" and then", bos=False)]
    events = list(divided.generate(longer, GREEDY, threading.Event()))
    assert isinstance(events[-1], Finish) and events[-1].cached_tokens >= len(first)
    again = [each.id for each in events if isinstance(each, Step)]
    other = [*first[:3], *divided.encode(PROMPTS[2], bos=False)]  # less than half of it: copied from, not cut
    ids_of(divided, other)
    divided._prefix.clear()
    assert ids_of(divided, longer) == again


def test_vectors_are_those_of_one_process(divided, alone):
    ids = divided.encode(PROMPTS[0])
    (found,) = divided.embed([ids], "last", threading.Event())
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(alone.hidden(alone.begin(), ids)[-1], dim=0)
    assert (torch.tensor(found) - wanted).norm() < 1e-3


def test_other_programs_are_given_no_model_whose_forward_would_leave_ranks_behind(divided):
    assert divided.hf is None and divided.kernel == "tensor parallel"
    assert "Computed by 2 processes together (tensor parallel)." in divided.notes


# what becomes of the processes -----------------------------------------------------------------------


@pytest.fixture
def ranks_of_test():
    """A function: the processes that were started in this test, and are there."""
    before = {each.pid for each in rank_processes()}
    return lambda: [each for each in rank_processes() if each.pid not in before]


def test_four_ranks_answer_and_leave_no_process(tmp_path, monkeypatch, ranks_of_test):
    monkeypatch.setitem(tiny.ARCHITECTURES, "qwen2", {**tiny._LLAMA, "num_attention_heads": 8})  # 2 key heads for 4 ranks
    tiny.write(tmp_path / "model", "qwen2")
    tiny.write_tokenizer(tmp_path / "model")
    prompt = [0, *range(40, 70)]
    whole = load(tmp_path / "model", TransformersOptions(device="cpu"))
    wanted = ids_of(whole, prompt)
    whole.close()
    loaded = load(tmp_path / "model", TransformersOptions(device="cpu", tensor_parallel=4))
    assert len(ranks_of_test()) == 3
    assert ids_of(loaded, prompt)[:8] == wanted[:8]
    loaded.close()
    assert ranks_of_test() == []


def test_a_rank_that_is_killed_ends_the_answer_with_a_sentence_and_all_others(folder, ranks_of_test):
    loaded = load(folder, TransformersOptions(device="cpu", tensor_parallel=2))
    (rank,) = ranks_of_test()
    stream = loaded.generate(
        [0, 50, 60], GenerationParams(max_new_tokens=200, temperature=0.0, ignore_eos=True), threading.Event()
    )
    next(stream)
    rank.kill()
    with pytest.raises(AnswerFailed, match=r"The process of GPU 1 has ended \(by signal 9\)\. Press Reload in the Model tab\."):
        list(stream)
    assert not loaded.alive
    with pytest.raises(AnswerFailed, match="has ended"):
        ids_of(loaded, [0, 50, 60])
    loaded.close()
    assert ranks_of_test() == []


def test_a_rank_that_is_killed_while_nobody_asks_is_noticed(folder, ranks_of_test):
    loaded = load(folder)
    (rank,) = ranks_of_test()
    rank.kill()
    wait_until(lambda: not loaded.alive)
    loaded.close()


def test_a_rank_that_cannot_load_says_why(tmp_path, ranks_of_test):
    settings = {
        "folder": str(tmp_path / "nothing"),
        "ranks": 2,
        "device": "cpu",
        "dtype": "float32",
        "rope": [1, 1, 0],
        "threads": 1,
    }
    ranks = Ranks(2, settings)
    with pytest.raises(LoadFailed, match=r"config\.json"):
        ranks.wait("loaded")
    ranks.close()
    assert ranks_of_test() == []


def test_a_rank_that_is_killed_while_it_loads_ends_the_load(folder, ranks_of_test):
    killed = []

    def tell(share, text):
        if not killed and (found := ranks_of_test()):
            found[0].kill()
            killed.append(found[0])

    with pytest.raises(GptqWebuiError, match="The process of GPU 1 has ended"):
        load(folder, tell=tell)
    assert ranks_of_test() == []


def test_a_cancelled_load_leaves_no_process(folder, ranks_of_test):
    def tell(share, text):
        if text.startswith("Waiting"):
            raise LoadCancelled("Stopped.")

    with pytest.raises(LoadCancelled):
        load(folder, tell=tell)
    assert ranks_of_test() == []


SERVING = """
import runpy, sys, threading; runpy.run_path(sys.argv[1])["register"]()
from pathlib import Path
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions
options = TransformersOptions(device="cpu", tensor_parallel=2)
loaded = TransformersLoader().load(LocalModel.read(Path(sys.argv[2])), options, lambda share, text: None)
params = GenerationParams(max_new_tokens=200, temperature=0.0, ignore_eos=True)
for event in loaded.generate([0, 50, 60], params, threading.Event()):
    print("token", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("end", (signal.SIGINT, signal.SIGKILL), ids=("Ctrl+C", "killed"))
def test_the_end_of_the_engines_process_is_the_end_of_all(folder, end):
    import gptq_webui

    script = str(Path(gptq_webui.__file__ or "").parent / "script.py")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"token\n"
        ranks = rank_processes(process.pid)
        assert len(ranks) == 1
        os.killpg(process.pid, end)  # as the terminal does
        process.stdout.close()
        wait_until(lambda: process.poll() is not None and all(map(is_gone, ranks)))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
