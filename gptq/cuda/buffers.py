"""The activations of one step: tensors of n rows, a row for each sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_layers import Layer
from .model_shape import ModelShape


@dataclass(frozen=True)
class Buffers:
    """Inputs of products are in their weight's fragment order. Their padding is zero and is never written."""

    residual: Tensor  # fp32 [n, H]
    x: Tensor  # fp16 [n, padded], input of qkv
    qkv: Tensor  # fp16 [n, (heads + 2 kv heads) * D]
    attended: Tensor  # fp16 [n, padded], input of o
    x_mlp: Tensor  # fp16 [n, padded], input of gate and up
    inner: Tensor  # fp16 [n, padded], input of down
    x_head: Tensor  # fp16 [n, H], input of the output layer, natural order

    @classmethod
    def of(cls, shape: ModelShape, layer: Layer, rows: int) -> "Buffers":
        """For layers of the sizes of `layer`."""
        device = layer.qkv.words.device

        def zeros(width: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        return cls(
            residual=zeros(shape.hidden, torch.float32),
            x=zeros(layer.qkv.padded),
            qkv=zeros(shape.qkv_width),
            attended=zeros(layer.o.padded),
            x_mlp=zeros(layer.gate_up.padded),
            inner=zeros(layer.down.padded),
            x_head=zeros(shape.hidden),
        )

    def first(self, rows: int) -> "Buffers":
        """Views of the first rows."""
        return Buffers(**{name: tensor[:rows] for name, tensor in vars(self).items()})
