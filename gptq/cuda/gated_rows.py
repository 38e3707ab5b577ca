"""A row that a gate opens, row * sigmoid(gate), as one kernel: attention's output of Qwen3-Next and its like.

The gate lies between the queries there, so that its numbers would be copied first, then opened, then multiplied.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .deferred import Deferred, plainly
from .gpu_kernels import Gpu
from .kernel_arguments import GATE_ROW
from .natural_order import NUMBERS
from .token_attention import suffix

_SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, functional.sigmoid)
_PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)


@dataclass(frozen=True, eq=False)
class Spread:
    """Heads of a token that lie apart, and have not been put together yet."""

    heads: Tensor  # [1, 1, heads, D]
    alone: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Opened:
    """The sigmoid of a row that has not been computed yet."""

    gate: Tensor  # [1, 1, heads, D], a head's numbers side by side; or [1, 1, N]
    alone: ClassVar[bool] = True


class GatedRows:
    """Its kernel on one GPU."""

    def __init__(self, gpu: Gpu, deferred: Deferred) -> None:
        self._gpu, self._deferred = gpu, deferred

    def call(self, func: Any, args: Any, given: dict[str, Any]) -> Tensor | None:
        """What a function of torch gives, if it is a part of such a gate; None if torch is to compute it."""
        if given or not args or not isinstance(args[0], Tensor):
            return None
        if func is Tensor.reshape:
            return self._put_together(args[0], args[1:])
        if func in _SIGMOIDS and len(args) == 1:
            return self._open(args[0])
        if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor):
            return self._multiply(args[0], args[1])
        return None

    def _put_together(self, x: Tensor, shape: Any) -> Tensor | None:
        with plainly():
            if x.dim() != 4 or x.numel() != x.shape[2] * x.shape[3] or x.is_contiguous() or not _usual(x) or x.stride(3) != 1:
                return None
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device).reshape(*shape)
            if out.dim() != 3:
                return None
        self._deferred.write(x)
        self._deferred.defer((out,), (x,), Spread(x), lambda: out.view(x.shape).copy_(x))
        return out

    def _open(self, x: Tensor) -> Tensor | None:
        spread = self._deferred.what(x, Spread)
        with plainly():
            if x.dim() != 3 or x.numel() != x.shape[-1] or not _usual(x) or not x.is_contiguous():
                return None
            out = torch.empty_like(x)
        if spread is None:
            self._deferred.write(x)
        gate = x if spread is None else spread.heads

        def run() -> None:
            self._deferred.write(x)
            torch.sigmoid(x, out=out)

        self._deferred.defer((out,), (gate,), Opened(gate), run)
        return out

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor | None:
        row, opened = (
            (b, self._deferred.what(a, Opened)) if self._deferred.what(b, Opened) is None else (a, self._deferred.what(b, Opened))
        )
        if opened is None or a.shape != b.shape or a.dtype != b.dtype or not row.is_contiguous():
            return None
        self._deferred.write(row)
        with plainly():
            gate, out = opened.gate, torch.empty_like(row)
            apart = gate.dim() == 4
            arguments = GATE_ROW.pack(
                x=row, gate=gate, out=out, n=row.numel(), width=gate.shape[-1], stride=gate.stride(2) if apart else gate.shape[-1]
            )
            self._gpu.run(f"gate_row_{suffix(row)}", (-(-row.numel() // 256),), 256, arguments, overlap=True)
        return out


def _usual(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in NUMBERS
