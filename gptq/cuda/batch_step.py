"""The next token of several sequences in one step: row i of the buffers is the i-th sequence.

Seven kernels a layer where one sequence takes five (cuda_step.py): norms are kernels of their own, and products are those
of small_batch.cu. The weights are read once for all rows. A graph is recorded for each number of rows when it first occurs.
"""

import torch
from torch import Tensor

from . import small_batch
from .attention import AttentionWork, attend
from .buffers import Buffers
from .cuda_layers import ModelWeights
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .model_shape import ModelShape
from .row_kernels import embed, norm_rows
from .sample import sample
from .sequences import Sequences


class BatchStep:
    """Up to `sequences.parallel` sequences of one model."""

    def __init__(self, gpu: Gpu, shape: ModelShape, weights: ModelWeights, sequences: Sequences, recorder: GraphRecorder) -> None:
        self._gpu, self._shape, self._weights, self._sequences, self._recorder = gpu, shape, weights, sequences, recorder
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._buffers = Buffers.of(shape, weights.layers[0], sequences.parallel)
        self._work = AttentionWork(gpu, shape, sequences.parallel)

    def step(self, rows: int) -> None:
        """Compute the tokens in `ids` of the first rows and choose the next ones."""
        graph = self._graphs.get(rows)
        if graph is None:
            self._head(1)  # cuBLAS makes its handle outside of a recording

            def run() -> None:
                self.forward(rows)
                sample(self._gpu, self._sequences, 0, rows)

            graph = self._graphs[rows] = self._recorder.record(run)
        graph.replay()

    def forward(self, rows: int) -> None:
        """From `ids` at `positions` to `logits` of the first rows, on the current stream."""
        gpu, shape, weights, sequences, eps = self._gpu, self._shape, self._weights, self._sequences, self._shape.eps
        here = self._buffers.first(rows)
        embed(gpu, weights.embedding, sequences.ids, weights.layers[0].qkv.permutation, here.residual, here.x)
        for at, layer in enumerate(weights.layers):
            norm_rows(gpu, here.residual, layer.input_norm, layer.qkv.order, here.x, eps)
            small_batch.multiply(gpu, layer.qkv, "PLAIN", here.x, here.qkv)
            attend(gpu, shape, weights, at, sequences, self._work, qkv=here.qkv, out=here.attended)
            small_batch.multiply(gpu, layer.o, "RESIDUAL", here.attended, here.residual)
            norm_rows(gpu, here.residual, layer.post_norm, layer.gate_up.order, here.x_mlp, eps)
            small_batch.multiply(gpu, layer.gate_up, "SILU", here.x_mlp, here.inner)
            small_batch.multiply(gpu, layer.down, "RESIDUAL", here.inner, here.residual)
        norm_rows(gpu, here.residual, weights.final_norm, weights.identity, here.x_head, eps)
        self._head(rows)

    def _head(self, rows: int) -> None:
        self._sequences.logits[:rows] = _product(self._buffers.x_head[:rows], self._weights.head)

    def close(self) -> None:
        self._graphs.clear()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of halves, [T, N]; fp32 where torch can leave the sums so."""
    if hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()
