"""A Llama-family model's layers as the kernels read them: what they can be made of, and making them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..llama import LayerParts, LlamaParts
from .cuda_kernels import HEAD_DIMS, Gpu, Shape
from .cuda_weights import Unsuited, Weight, repack


@dataclass(frozen=True)
class Layer:
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: Tensor  # fp16, engine order of qkv's input
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int

    @property
    def weights(self) -> tuple[Weight, Weight, Weight, Weight]:
        return self.qkv, self.o, self.gate_up, self.down


def take(gpu: Gpu, layer: LayerParts, shapes: Sequence[Shape]) -> Layer:
    """Repack a layer's weights, and let go of the packed tensors they came from. `shapes` are those of `products`."""
    qkv_layers, o_layers, gate_up_layers, down_layers = products(layer)
    qkv = repack(gpu, qkv_layers, shapes[0])
    o = repack(gpu, o_layers, shapes[1])
    # gate and up are stored so that their product comes out in the order of down's input
    down = repack(gpu, down_layers, shapes[3])
    inner = down.in_features
    at = down.order.long().view(-1, 8)  # [tiles, 8], -1 where down's input is padding
    up = torch.where(at >= 0, at + inner, -1)
    gate_up = repack(gpu, gate_up_layers, shapes[2], torch.cat([at, up], dim=1).view(-1))
    for each in (*qkv_layers, *o_layers, *gate_up_layers, *down_layers):
        each.release()

    def in_order(norm: Tensor, weight: Weight) -> Tensor:
        return torch.where(weight.order >= 0, norm.data.half()[weight.order.clamp(min=0).long()], 0).contiguous()

    return Layer(
        qkv,
        o,
        gate_up,
        down,
        in_order(layer.input_norm, qkv),
        in_order(layer.post_norm, gate_up),
        None if layer.q_norm is None else layer.q_norm.data.half().contiguous(),
        None if layer.k_norm is None else layer.k_norm.data.half().contiguous(),
        layer.window,
    )


def products(layer: LayerParts) -> tuple[Sequence[GPTQLinear], ...]:
    """The packed layers of qkv, o, gate and up, down. Raises Unsuited if one is not packed."""
    four = (layer.qkv, (layer.o,), layer.gate_up, (layer.down,))
    for each in four:
        for one in each:
            if not isinstance(one, GPTQLinear):
                raise Unsuited("a layer that is not packed")
    return four  # type: ignore[return-value]


def require(parts: LlamaParts) -> None:
    """Raises Unsuited for what the kernels cannot do."""
    if parts.head_dim not in HEAD_DIMS:
        raise Unsuited(f"heads of {parts.head_dim} dimensions")
    if not isinstance(parts.head, nn.Linear) or parts.head.bias is not None:
        raise Unsuited("a packed output layer")
    if parts.head.weight.dtype != torch.float16 or parts.embedding.dtype != torch.float16:
        raise Unsuited("numbers other than fp16")
    if parts.embedding.shape[1] % 8:
        raise Unsuited("a width that is no multiple of 8")
    sizes = {(each.qkv[0].in_features, each.down.in_features, each.o.in_features) for each in parts.layers}
    if len(sizes) != 1:
        raise Unsuited("layers of different sizes")
