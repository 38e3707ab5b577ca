"""Hessians of layers: the sum of x xᵀ over every input x that a calibration text sends into them.

Layers that read the same tensor one after the other (q, k, v; gate, up) share one Hessian.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class InputHessians:
    """Collects while its `with` block runs; the model is run inside of it. Hessians are fp32 [K, K], where the inputs are."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._hessians: dict[str, Tensor] = {}
        self._shared: dict[str, str] = {}  # layer -> the first layer with the same input
        self._seen: list[tuple[Tensor, str]] = []  # inputs of one run, kept so that identity means something
        self._hooks: list[Any] = []

    def __enter__(self) -> "InputHessians":
        self._hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._layers.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for each in self._hooks:
            each.remove()
        self._seen.clear()

    def start_batch(self) -> None:
        """To be called before every run of the model."""
        self._seen.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            first = next((other for tensor, other in self._seen if tensor is x), None)
            if first is not None and name not in self._hessians:
                self._shared[name] = first
                return
            self._seen[:] = [*self._seen[-1:], (x, name)]  # an input is shared by layers that run one after the other
            rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, K]
            if name not in self._hessians:
                self._hessians[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._hessians[name].addmm_(rows.T, rows)

        return collect

    def groups(self) -> list[tuple[list[str], Tensor]]:
        """(names of the layers that share an input, Hessian fp32 [K, K] of that input). They are handed over, so once only."""
        groups: dict[str, list[str]] = {}
        for name, module in self._layers.items():
            first = self._shared.get(name, name)
            groups.setdefault(first, []).append(name)
            if first not in self._hessians:  # an expert that no token reached: every input counts the same
                weight = as_rows(module)
                self._hessians[first] = torch.eye(weight.shape[0], device=weight.device)
        return [(names, self._hessians.pop(first)) for first, names in groups.items()]


def as_rows(module: nn.Module) -> Tensor:
    """The weight [K, N], input rows first: a Conv1D holds it so, an nn.Linear its transpose."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, nn.Linear) else weight
