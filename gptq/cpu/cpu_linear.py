"""A single layer on the compiled kernels: for transformers' own forward, of other architectures or by other callers."""

import numpy as np
import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from . import cpu_kernels
from . import forward as f
from .cpu_weights import Weights, aligned, from_packed
from .thread_team import Team
from .weight_table import table_of

_ROWS = 256  # of x at a time


class CpuLinear:
    """y = x W + bias with the weights that a CpuStepper reads."""

    def __init__(self, weights: Weights, team: Team) -> None:
        self._weights, self._team = weights, team
        self._table, self._order, self._bias = table_of([weights], [[0, 0]])

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        w = self._weights
        flat = x.reshape(-1, w.inputs)
        out = np.empty((flat.shape[0], w.tiles * 16), np.float32)
        for start in range(0, flat.shape[0], _ROWS):
            rows = min(_ROWS, flat.shape[0] - start)
            part = np.zeros((rows, -(-w.inputs // 16) * 16), np.float32)
            part[:, : w.inputs] = flat[start : start + rows].detach().float().numpy()
            x8 = aligned((1, 1, rows * max(1, w.chunks * w.chunk_rows) * 2), np.int8)
            scales = np.empty((1, 1, rows * max(1, w.chunks)), np.float32)
            sums = np.empty((1, 1, rows * max(1, w.chunks)), np.int32)
            self._team.run(
                2, f.linear, rows, self._table, self._order, self._bias, part, x8, x8.view(np.int16), scales, sums,
                out[start : start + rows],
            )  # fmt: skip
        y = torch.from_numpy(out)[:, : w.outputs]
        return y.to(x.dtype).reshape(*x.shape[:-1], w.outputs)


def replace_layers(model: nn.Module, threads: int) -> int:
    """Let the compiled kernels compute the packed layers of a model on the processor; how many."""
    team = Team(threads)
    count = 0
    for module in model.modules():
        if isinstance(module, GPTQLinear) and module.qweight.device.type == "cpu":
            module.release(CpuLinear(from_packed(module, cpu_kernels.ISA, team), team))
            count += 1
    return count
