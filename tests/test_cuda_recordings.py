"""Python's garbage while graphs are recorded, where it holds what is a GPU's. Skipped without a GPU."""

import gc

import pytest
import torch
from test_recordings import much

from gptq_webui.gptq.cuda.graphs import GraphRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


class Other:
    """Garbage that only a collection finds, and whose end no recording outlives."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        torch.cuda.synchronize()


@pytest.mark.parametrize("all_at_once", [False, True])
def test_a_model_that_nobody_has_any_more_does_not_end_a_recording(all_at_once):
    gc.collect()
    recorder, x = GraphRecorder(torch.device("cuda", 0)), torch.zeros(4, device="cuda")

    def run():
        Other()
        much()
        x.add_(1)

    graphs = recorder.record_all([run, run]) if all_at_once else [recorder.record(run) for _ in range(2)]
    for graph in graphs:
        graph.replay()
    assert x.tolist() == [2] * 4
    graphs.clear()
    gc.collect()
    recorder.close()
