"""The graphs of short prompts: which are recorded, and what is launched where there is no room for them. Runs on any machine."""

from collections import Counter

import torch
from test_cuda_launches import Recorder, Replay, gpu, make  # noqa: F401

from gptq_webui.gptq.cuda.kv_pages import PagedMemory


def test_a_short_prompt_is_launched_as_graphs_that_are_recorded_once(gpu, monkeypatch):  # noqa: F811
    recorded = []
    monkeypatch.setattr(Recorder, "record_all", lambda self, runs: recorded.append(len(runs)) or [Replay(each) for each in runs])
    step = make(gpu, context=512)
    step.sequences.use(PagedMemory(step.pages), 300)
    for tokens in (33, 64, 50, 20, 128):
        step.prefill([1] * tokens, 0)
    assert recorded == [3] * 3, "64, 32 and 128 rows, for two layers: before, between and after their attentions"
    step.prefill([1] * 129, 0)
    assert len(recorded) == 3

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "record_all", full)
    gpu.launched.clear()
    step.prefill([1] * 90, 0)
    assert Counter(name.split("_")[0] for name in gpu.launched)["wide"] == 8, "without graphs where the GPU is full"
