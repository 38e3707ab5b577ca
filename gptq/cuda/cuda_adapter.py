"""LoRA adapters in the layout of the GPU's step: several become one of a larger rank, and layers that share an input one product.

A and B are fp16, each divided by its largest number; their product's scale is one float. So numbers far from one lose nothing.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import BadCheckpoint
from ..families.parts import ModelParts
from ..lora import Part
from .adapter_rows import MOST_RANK
from .cuda_layers import ROLES, Layer, gate_up_columns, products

_ENTRY = struct.Struct("<QQif")  # AdapterEntry of adapter_rows.cu


@dataclass(frozen=True)
class Adaptable:
    """Where a layer of the model is in the step."""

    module: nn.Module  # kept, so that its id stays its own
    layer: int
    role: str
    first: int  # of its outputs, among those of the product


def adaptable_layers(parts: ModelParts) -> dict[int, Adaptable]:
    """By a module's id, every layer that adapters can change."""
    found: dict[int, Adaptable] = {}
    for at, layer in enumerate(parts.layers):
        for role, modules in products(layer).items():
            first = 0
            for module in modules:
                found[id(module)] = Adaptable(module, at, role, first)
                first += module.out_features
    return found


@dataclass(frozen=True)
class Matrices:
    """Of one product: y += scale · B (A x)."""

    inner: Tensor  # A, fp16 [rank, padded], fragment order
    outer: Tensor  # B transposed, fp16 [rank, N], in the order of the weight's rows
    scale: float

    def of_rows(self, x: Tensor) -> Tensor:
        """B A x of x fp16 [T, padded] -> fp32 [T, N]."""
        return (x.float() @ self.inner.float().T).mul_(self.scale) @ self.outer.float()


class CudaAdapter:
    """y += sum of w B (A x) over adapters with weights w."""

    def __init__(
        self,
        adapters: Sequence[tuple[Mapping[str, Part], float]],  # of lora.read, with their weights
        adaptable: Mapping[int, Adaptable],
        layers: Sequence[Layer],
    ) -> None:
        """Raises BadCheckpoint for a module that is not among `adaptable`, and for ranks of more than MOST_RANK together."""
        found: dict[tuple[int, str], list[tuple[int, Tensor, Tensor]]] = {}
        for parts, weight in adapters:
            for name, (module, inner, outer) in parts.items():
                own = adaptable.get(id(module))
                if own is None:
                    raise BadCheckpoint(
                        f"The adapter changes {name}, which is no linear layer of a block. It can only be given for the whole "
                        "model: set it as the option LoRA adapter in the Model tab."
                    )
                found.setdefault((own.layer, own.role), []).append((own.first, inner, outer.float() * weight))
        self.matrices = {(at, role): _matrices(pairs, layers[at], role) for (at, role), pairs in found.items()}
        self.ranks = {role: max((len(each.inner) for (_at, own), each in self.matrices.items() if own == role), default=0)
                      for role in ROLES}  # fmt: skip
        if (most := max(self.ranks.values())) > MOST_RANK:
            raise BadCheckpoint(
                f"The adapters have rank {most} together; the GPU's step takes {MOST_RANK}. Choose fewer of them."
            )
        entries = bytearray()
        for at in range(len(layers)):
            for role in ROLES:
                each = self.matrices.get((at, role))
                entries += _ENTRY.pack(0, 0, 0, 0.0) if each is None else _ENTRY.pack(
                    each.inner.data_ptr(), each.outer.data_ptr(), len(each.inner), each.scale
                )  # fmt: skip
        self._table = torch.frombuffer(entries, dtype=torch.uint8).to(layers[0].qkv.words.device)

    @property
    def address(self) -> int:
        """Of its table on the GPU: an entry for each layer and role."""
        return self._table.data_ptr()

    @property
    def size_bytes(self) -> int:
        return self._table.numel() + sum(2 * (each.inner.numel() + each.outer.numel()) for each in self.matrices.values())


def _matrices(pairs: Sequence[tuple[int, Tensor, Tensor]], layer: Layer, role: str) -> Matrices:
    weight = layer.weights[ROLES.index(role)]
    device = weight.words.device
    inner = torch.cat([each.float().to(device) for _first, each, _outer in pairs])  # [rank, K]
    columns = torch.arange(weight.out_features, device=device) if role != "gate_up" else gate_up_columns(layer.down)
    outer = torch.zeros(len(inner), int(columns.max()) + 1, device=device)  # [rank, outputs in the model's order]
    at = 0
    for first, own, out in pairs:
        outer[at : at + len(own), first : first + len(out)] = out.to(device).T
        at += len(own)
    inner = torch.where(weight.order >= 0, inner[:, weight.order.clamp(min=0).long()], 0.0)
    outer = torch.where(columns >= 0, outer[:, columns.clamp(min=0)], 0.0)
    largest = [float(each.abs().max()) or 1.0 for each in (inner, outer)]
    return Matrices((inner / largest[0]).half().contiguous(), (outer / largest[1]).half().contiguous(), largest[0] * largest[1])
