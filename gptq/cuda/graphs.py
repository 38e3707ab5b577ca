"""Recording what is launched as CUDA graphs, which one call replays."""

from collections.abc import Callable, Sequence

import torch

from ..collector import without_collector
from .cuda_driver import OwnStream


class GraphRecorder:
    """All graphs of a model share one stream and one pool of memory: cuBLAS keeps a workspace for each stream that it has
    seen, and no two graphs run at once. Garbage that Python frees meanwhile, of another model's on the GPU say, would end a
    recording."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._own = OwnStream()
        self._stream = torch.cuda.ExternalStream(self._own.handle.value, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a new pool: torch frees one with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `run` launches, as a graph."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with without_collector(), recording:
            run()
        return graph

    def record_all(self, runs: Sequence[Callable[[], None]]) -> list[torch.cuda.CUDAGraph]:
        """Each as a graph of its own, where none takes memory: nothing is freed before, which `record` does every time."""
        torch.cuda.synchronize(self._device)
        graphs: list[torch.cuda.CUDAGraph] = []
        pool = torch.cuda.graph_pool_handle()  # of these alone: one whose graphs are all gone cannot be used again
        with without_collector(), torch.cuda.stream(self._stream):
            for run in runs:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
                graphs.append(graph)
        return graphs

    def close(self) -> None:
        """The graphs must be gone."""
        self._own.close()
