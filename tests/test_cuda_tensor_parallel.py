"""tensor_parallel on two GPUs: the recorded step, sums by mailboxes, and a rank that dies. Skipped without two GPUs."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_tensor_parallel import rank_processes, wait_until

import tiny
from gptq_webui.core.chat import Step
from gptq_webui.core.errors import AnswerFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.transformers_stepper import TransformersStepper
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
IDS = [0, *range(40, 90), 7, 9, 11]
ON_TWO = TransformersOptions(device="cuda", tensor_parallel=2, context_tokens=2048)

SUMS = """
import runpy, sys; runpy.run_path(sys.argv[1])["register"]()
from pathlib import Path
import torch
from gptq_webui.gptq.cuda.graphs import GraphRecorder
from gptq_webui.gptq.parallel.rank_group import RankGroup
rank, folder = int(sys.argv[2]), Path(sys.argv[3])
device = torch.device("cuda", rank); torch.cuda.set_device(device)
group = RankGroup(rank, 2); group.join(folder, device)
print(group.describes, flush=True)
random = torch.Generator().manual_seed(4)
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for count in (4, 6, 8192, 28672, 1 << 19, 1 << 20):
        both = [torch.randn(count, generator=random).to(dtype) for _ in range(2)]
        x = both[rank].to(device); group.sum(x)
        wanted = (both[0].float() + both[1].float()).to(dtype)
        assert torch.equal(x.cpu(), wanted), (dtype, count)
        found = group.gather(both[rank].to(device)[None])
        assert all(torch.equal(a.cpu()[0], b) for a, b in zip(found, both)), (dtype, count)
x = torch.ones(8192, dtype=torch.float16, device=device)
y = torch.full_like(x, rank + 1)
def run():
    for _ in range(160):
        x.copy_(y); group.sum(x)
def timed(what):
    run()
    graph = GraphRecorder(device).record(run)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(20):
        graph.replay()
    before.record()
    for _ in range(20):
        graph.replay()
    after.record(); group.require_all(); torch.cuda.synchronize()
    assert x.eq(3).all()
    print("us a sum and a copy by", what, round(before.elapsed_time(after) * 1000 / 3200, 2), flush=True)
timed("mailboxes")
boxes, group._mailboxes = group._mailboxes, None
timed("NCCL")
"""


def test_rows_are_summed_and_collected_right_and_in_graphs(tmp_path):
    import gptq_webui

    script = str(Path(gptq_webui.__file__ or "").parent / "script.py")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SUMS, script, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [each.communicate(timeout=200)[0] for each in started]
    print(said[0])
    assert all(each.returncode == 0 for each in started), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    twin = tiny.write(path, seed=3, shared_order=True)
    tiny.write_tokenizer(path)
    return path, twin


def load(folder):
    return TransformersLoader().load(LocalModel.read(folder), ON_TWO, lambda share, text: None)


@pytest.fixture(scope="module")
def divided(folder):
    loaded = load(folder[0])
    yield loaded
    loaded.close()
    assert rank_processes() == []


def test_the_recorded_step_of_two_gpus_gives_the_twins_logits(divided, folder):
    print(divided.notes)
    assert not any("graph" in each for each in divided.notes), divided.notes
    stepper, twin = divided._stepper, TransformersStepper(folder[1].eval())
    with torch.inference_mode():
        memory, other = stepper.begin(), twin.begin()
        pairs = [(stepper.prefill(memory, IDS).float().cpu(), twin.prefill(other, IDS))]
        pairs += [(stepper.step(memory, id).float().cpu(), twin.step(other, id)) for id in range(100, 140)]
        fork = memory.fork(30)
        pairs.append((stepper.step(fork, 5).float().cpu(), twin.prefill(twin.begin(), [*IDS[:30], 5])))
        pairs.append((stepper.step(memory, 6).float().cpu(), twin.step(other, 6)))
    errors = [float((own - wanted).norm() / wanted.norm()) for own, wanted in pairs]
    assert max(errors) < 1e-2, errors


def test_a_rank_that_is_killed_between_tokens_ends_the_answer_soon(folder):
    loaded = load(folder[0])
    before = rank_processes()
    stream = loaded.generate(IDS, GenerationParams(max_new_tokens=1500, temperature=0.0, ignore_eos=True), threading.Event())
    next(each for each in stream if isinstance(each, Step))
    before[-1].kill()
    began = time.monotonic()
    with pytest.raises(AnswerFailed, match="GPU 1 has ended"):
        list(stream)
    assert time.monotonic() - began < 30
    loaded.close()
    wait_until(lambda: not [each for each in rank_processes() if each in before[-1:]])
    again = load(folder[0])  # the GPUs are as they were
    assert list(again.generate(IDS, GenerationParams(max_new_tokens=4, ignore_eos=True), threading.Event()))
    again.close()
