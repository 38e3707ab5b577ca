"""The next token of several conversations in one step: row i of the buffers is the i-th conversation.

Seven kernels a layer where one conversation takes five (step.py): norms are kernels of their own, and products are those
of few.cu. The weights are read once for all rows. A graph is recorded for each number of rows when it first occurs.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import small_batch
from .attention import AttentionWork, attend

if TYPE_CHECKING:
    from .cuda_step import CudaStep


class Rows:
    """Up to `step.slots` conversations of one CudaStep; its buffers are made at the first step of more than one."""

    def __init__(self, step: "CudaStep") -> None:
        self._step = step
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        first, rows = step.layers[0], step.parallel

        def zeros(width: int, of: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(rows, width, dtype=of, device=step.device)

        self._residual = zeros(step.hidden, torch.float32)
        self._x = zeros(first.qkv.padded)
        self._x_mlp = zeros(first.gate_up.padded)
        self._qkv = zeros(first.qkv.out_features)
        self._attended = zeros(first.o.padded)
        self._inner = zeros(first.down.padded)
        self._x_head = zeros(step.hidden)
        self._work = AttentionWork(step, rows)

    def step(self, rows: int) -> None:
        """Compute the tokens in `ids` of the first rows and choose the next ones."""
        graph = self._graphs.get(rows)
        if graph is None:
            self._head(1)  # cuBLAS makes its handle outside of a recording

            def run() -> None:
                self.forward(rows)
                self._step.sample(0, rows)

            graph = self._graphs[rows] = self._step.record(run)
        graph.replay()

    def forward(self, rows: int) -> None:
        """From `ids` at `positions` to `logits` of the first rows, on the current stream."""
        step, prompt = self._step, self._step.prompt
        residual, x, x_mlp, attended = self._residual[:rows], self._x[:rows], self._x_mlp[:rows], self._attended[:rows]
        step.embed(residual, x, rows)
        for at, layer in enumerate(step.layers):
            prompt.norm_into(residual, layer.input_norm, layer.qkv.order, x)
            small_batch.multiply(step.gpu, layer.qkv, "PLAIN", x, self._qkv[:rows])
            attend(step, at, layer, self._qkv, attended, self._work, rows)
            small_batch.multiply(step.gpu, layer.o, "RESIDUAL", attended, residual)
            prompt.norm_into(residual, layer.post_norm, layer.gate_up.order, x_mlp)
            small_batch.multiply(step.gpu, layer.gate_up, "SILU", x_mlp, self._inner[:rows])
            small_batch.multiply(step.gpu, layer.down, "RESIDUAL", self._inner[:rows], residual)
        prompt.norm_into(residual, step.final_norm, step.identity, self._x_head[:rows])
        self._head(rows)

    def _head(self, rows: int) -> None:
        step = self._step
        step.logits[:rows] = _product(self._x_head[:rows], step.head)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of halves, [T, N]; fp32 where torch can leave the sums so."""
    if hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()
