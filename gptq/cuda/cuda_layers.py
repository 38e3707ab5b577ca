"""A model's weights as the kernels read them, and making them from its packed layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..families.parts import LayerParts, ModelParts, Norm
from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from .cuda_weights import Weight, packing_of, repack
from .gpu_kernels import Gpu
from .kernel_source import Packing
from .model_shape import ModelShape

ROLES = ("qkv", "o", "gate_up", "down")  # the four products of a layer
EPILOGUES = {"qkv": "PLAIN", "o": "RESIDUAL", "gate_up": "SILU", "down": "RESIDUAL"}
NORMED = ("qkv", "gate_up")  # their input is normed first


@dataclass(frozen=True)
class Layer:
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: Tensor  # fp16, fragment order of qkv's input
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int

    @property
    def weights(self) -> tuple[Weight, Weight, Weight, Weight]:
        """In the order of ROLES."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class ModelWeights:
    """What the kernels read and never write."""

    embedding: Tensor  # fp16 [rows, H]
    head: Tensor  # fp16 [V, H]
    final_norm: Tensor  # fp16 [H]
    cosines: Tensor  # fp32 [context, rotary_half]
    sines: Tensor
    identity: Tensor  # int32 [H]: the natural order, as a permutation
    layers: list[Layer] = field(default_factory=list)

    @classmethod
    def of(cls, parts: ModelParts, shape: ModelShape) -> "ModelWeights":
        """All but the layers."""
        cosines, sines = parts.angles(shape.context_tokens)
        return cls(
            embedding=parts.embedding.data.contiguous(),
            head=parts.head_weight.data.contiguous(),
            final_norm=parts.norm.weight.data.half().contiguous(),
            cosines=cosines,
            sines=sines,
            identity=torch.arange(shape.hidden, dtype=torch.int32, device=parts.device),
        )

    def take_layers(self, gpu: Gpu, parts: ModelParts, packings: Sequence["Packings"], progress: Callable[[float], None]) -> None:
        """Repack layer by layer, so that the GPU never holds both forms of a model."""
        for at, (layer, four) in enumerate(zip(parts.layers, packings, strict=True)):
            self.layers.append(_take(gpu, layer, four))
            progress((at + 1) / len(parts.layers))


Packings = dict[str, Packing]  # by role


def packings_of(layer: LayerParts) -> Packings:
    """The formats of a layer's four weights. Raises Unsuited if the kernels cannot read one of them."""
    return {role: packing_of(layers) for role, layers in products(layer).items()}


def inputs_of(layer: LayerParts) -> dict[str, int]:
    """By role, the inputs of the product."""
    return {role: layers[0].in_features for role, layers in products(layer).items()}


def products(layer: LayerParts) -> dict[str, Sequence[GPTQLinear]]:
    """By role, the packed layers that become one weight. Raises Unsuited if one is not packed."""
    assert layer.down is not None  # suitability.py: no experts
    found = dict(zip(ROLES, (layer.qkv, (layer.o,), layer.gate_up, (layer.down,)), strict=True))
    if not all(isinstance(one, GPTQLinear) for each in found.values() for one in each):
        raise Unsuited("a layer that is not packed")
    return found  # type: ignore[return-value]


def gate_up_columns(down: Weight) -> Tensor:
    """int64 [N]: the outputs of gate and up, counted from gate's through up's, in the order in which they are stored; -1 for
    padding. Their product comes out in the order of down's input."""
    at = down.order.long().view(-1, 8)  # [tiles, 8], -1 where down's input is padding
    up = torch.where(at >= 0, at + down.in_features, -1)
    return torch.cat([at, up], dim=1).view(-1)


def _take(gpu: Gpu, layer: LayerParts, packings: Packings) -> Layer:
    """Repack a layer's weights, and release the packed tensors that they came from."""
    sources = products(layer)
    qkv = repack(gpu, sources["qkv"], packings["qkv"])
    o = repack(gpu, sources["o"], packings["o"])
    down = repack(gpu, sources["down"], packings["down"])
    gate_up = repack(gpu, sources["gate_up"], packings["gate_up"], gate_up_columns(down))
    for each in sources.values():
        for one in each:
            one.release()

    def in_order(norm: Norm | None, weight: Weight) -> Tensor:
        assert norm is not None
        return torch.where(weight.order >= 0, norm.weight.data.half()[weight.order.clamp(min=0).long()], 0).contiguous()

    return Layer(
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        input_norm=in_order(layer.attention_norm, qkv),
        post_norm=in_order(layer.mlp_norm, gate_up),
        q_norm=None if layer.q_norm is None else layer.q_norm.weight.data.half().contiguous(),
        k_norm=None if layer.k_norm is None else layer.k_norm.weight.data.half().contiguous(),
        window=layer.window,
    )
