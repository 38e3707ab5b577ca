"""Recording what is launched as CUDA graphs, which one call replays."""

from collections.abc import Callable

import torch

from .cuda_driver import OwnStream


class GraphRecorder:
    """All graphs of a model share one stream and one pool of memory: cuBLAS keeps a workspace for each stream that it has
    seen, and no two graphs run at once."""

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
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph

    def close(self) -> None:
        """The graphs must be gone."""
        self._own.close()
