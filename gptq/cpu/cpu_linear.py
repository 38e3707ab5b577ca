"""One layer on the compiled kernels, for transformers' own forward: of other architectures, or when others call the model."""

import numpy as np
import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from . import cpu_kernels
from . import forward as f
from .cpu_weights import Weights, from_packed
from .dense_columns import columns_of
from .forward_arguments import LINEAR, Arguments
from .thread_team import Team
from .weight_room import WeightRoom, aligned
from .weight_table import tables_of

_ROWS = 256  # of x at a time


class CpuLinear:
    """y = x W + bias, with the same weights that a CpuStepper reads."""

    def __init__(self, weights: Weights, team: Team, columns: Tensor | None = None) -> None:
        """`columns` int64 [N]: the order in which the weights have the outputs, if it is not the layer's own."""
        self._weights, self._team = weights, team
        self._columns = columns
        self._back = None if columns is None else columns.argsort()
        self._tables = tables_of([weights], [(0, 0)])

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        w = self._weights
        flat = x.reshape(-1, w.inputs)
        out = np.empty((flat.shape[0], w.tiles * 16), np.float32)
        for start in range(0, flat.shape[0], _ROWS):
            rows = min(_ROWS, flat.shape[0] - start)
            part = np.zeros((rows, -(-w.inputs // 16) * 16), np.float32)
            part[:, : w.inputs] = flat[start : start + rows].detach().float().numpy()
            chunks = rows * max(1, w.chunks)
            rounded = {
                "x": aligned((rows * max(1, w.chunks * w.chunk_rows) * 2,), np.int8),
                "scales": np.empty(chunks, np.float32),
                "sums": np.empty(chunks, np.int32),
                "buffers": 1,
                "input_bytes": rows * max(1, w.chunks * w.chunk_rows) * 2,
                "chunks": chunks,
            }
            y = out[start : start + rows]
            arguments = Arguments(
                LINEAR, tables=self._tables, rows=rows, x=part, x_width=part.shape[1], rounded=rounded, y=y, y_width=y.shape[1]
            )
            self._team.run(2, f.linear, arguments.array)
        whole = torch.from_numpy(out)[:, : w.outputs]
        if self._back is not None:
            whole = whole[:, self._back]
        return whole.to(x.dtype).reshape(*x.shape[:-1], w.outputs)

    def gradient(self, y: Tensor) -> Tensor:
        """Of the outputs, [M, N] -> of the inputs, fp32 [M, K]. The weights are multiplied out, some outputs at a time."""
        y = y.detach().float()
        if self._columns is not None:
            y = y[:, self._columns]
        x = torch.zeros(y.shape[0], self._weights.inputs)
        for start, end, weight in columns_of(self._weights, self._team):
            x.addmm_(y[:, start:end], weight.T)
        return x

    def dense(self) -> Tensor:
        """The weight, fp32 [N, K]."""
        out = torch.empty(self._weights.outputs, self._weights.inputs)
        for start, end, weight in columns_of(self._weights, self._team):
            out[start:end] = weight.T
        return out if self._back is None else out[self._back]


def replace_layers(model: nn.Module, threads: int) -> int:
    """Replace the packed layers of a model on the CPU by compiled ones; returns how many."""
    team, room = Team(threads), WeightRoom()
    count = 0
    for module in model.modules():
        if isinstance(module, GPTQLinear) and module.qweight.device.type == "cpu":
            module.release(CpuLinear(from_packed(module, cpu_kernels.ISA, team, allocate=room.zeros), team))
            count += 1
    return count
