"""What a short prompt launches between two attentions, as recorded graphs: the host launches one of them in place of six kernels.

A short prompt is computed faster than Python launches its kernels one by one. Attention depends on the pieces of the prompt,
so it is launched as for long ones (prompt.py).
"""

import logging
from collections.abc import Callable
from functools import partial

import torch

from . import small_batch
from .buffers import Buffers
from .cuda_layers import ModelWeights
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .model_shape import ModelShape
from .row_kernels import norm_rows

log = logging.getLogger(__name__)

ROWS = (8, 16, 32, 64, 96, 128)  # that graphs are recorded for: of more, the kernels take longer than their launches (NOTES.md)


class PromptGraphs:
    """Of one model. Rows beyond the prompt's are computed too, from what was there before: rows do not depend on each other."""

    def __init__(self, gpu: Gpu, shape: ModelShape, weights: ModelWeights, recorder: GraphRecorder) -> None:
        self._gpu, self._shape, self._weights, self._recorder = gpu, shape, weights, recorder
        self._buffers: Buffers | None = None
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self._full = False  # the GPU has no room for the buffers

    def of(self, tokens: int) -> tuple[Buffers, list[torch.cuda.CUDAGraph]] | None:
        """Buffers of so many rows, and the graphs: to the first layer's qkv, and from `attended` of each layer to the next one's
        qkv or the last `residual`. None for more tokens than any graph has, or where the GPU is full."""
        rows = next((each for each in ROWS if each >= tokens), None)
        if rows is None or self._full:
            return None
        try:
            if self._buffers is None:
                self._buffers = Buffers.of(self._shape, self._weights.layers[0], ROWS[-1])
            if rows not in self._graphs:
                self._graphs[rows] = self._recorder.record_all(self._runs(self._buffers.first(rows)))
        except torch.OutOfMemoryError:
            log.info("short prompts are read without graphs: the GPU is nearly full")
            self._buffers, self._full = None, True
            self._graphs.clear()
            return None
        return self._buffers.first(tokens), self._graphs[rows]

    def _runs(self, here: Buffers) -> list[Callable[[], None]]:
        return [partial(self._between, here, at) for at in range(-1, len(self._weights.layers))]

    def _between(self, here: Buffers, at: int) -> None:
        """From the attention of layer `at` to that of the next; -1: from the embeddings."""
        gpu, layers, eps = self._gpu, self._weights.layers, self._shape.eps
        if at >= 0:
            layer = layers[at]
            small_batch.multiply(gpu, layer.o, "RESIDUAL", here.attended, here.residual)
            norm_rows(gpu, here.residual, layer.post_norm, layer.gate_up.order, here.x_mlp, eps)
            small_batch.multiply(gpu, layer.gate_up, "SILU", here.x_mlp, here.inner)
            small_batch.multiply(gpu, layer.down, "RESIDUAL", here.inner, here.residual)
        if at + 1 < len(layers):
            layer = layers[at + 1]
            norm_rows(gpu, here.residual, layer.input_norm, layer.qkv.order, here.x, eps)
            small_batch.multiply(gpu, layer.qkv, "PLAIN", here.x, here.qkv)

    def close(self) -> None:
        """Drop them."""
        self._graphs.clear()
