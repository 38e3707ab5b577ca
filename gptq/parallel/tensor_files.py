"""The tensors of a model's files, of which only the wanted rows or columns are read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.models import tensors_of
from ...core.safetensors_header import TensorInfo
from .shares import Span


class TensorFiles:
    """Close it: it holds the files open, which are mapped, not read."""

    def __init__(self, weights: Iterable[Path], device: torch.device) -> None:
        """What is read goes to `device`. Raises BadCheckpoint for files that are cut short."""
        self.infos: Mapping[str, tuple[Path, TensorInfo]] = tensors_of(weights)
        self.device = device
        self._open: dict[Path, Any] = {}
        self.read_bytes = 0  # so far

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name][1].shape

    def whole(self, name: str) -> Tensor:
        return self._moved(self._file(name).get_tensor(name))

    def rows(self, name: str, span: Span) -> Tensor:
        """Of a tensor of one or two dimensions."""
        return self._moved(self._file(name).get_slice(name)[span.start : span.end])

    def columns(self, name: str, span: Span) -> Tensor:
        return self._moved(self._file(name).get_slice(name)[:, span.start : span.end])

    def close(self) -> None:
        """Safe to call twice. What was read stays."""
        self._open.clear()

    def _moved(self, tensor: Tensor) -> Tensor:
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor.to(self.device).contiguous()

    def _file(self, name: str) -> Any:
        path = self.infos[name][0]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]
