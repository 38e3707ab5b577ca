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

_ENTRY = struct.Struct("<QQii2i3if")  # AdapterEntry of adapted_gemv.cu
ENTRY_BYTES = _ENTRY.size


@dataclass(frozen=True)
class Adaptable:
    """Where a layer of the model is in the step."""

    module: nn.Module  # kept, so that its id stays its own
    layer: int
    role: str
    index: int  # among the layers of the product
    widths: tuple[int, ...]  # outputs of each of them


def adaptable_layers(parts: ModelParts) -> dict[int, Adaptable]:
    """By a module's id, every layer that adapters can change."""
    found: dict[int, Adaptable] = {}
    for at, layer in enumerate(parts.layers):
        for role, modules in products(layer).items():
            widths = tuple(each.out_features for each in modules)
            for index, module in enumerate(modules):
                found[id(module)] = Adaptable(module, at, role, index, widths)
    return found


@dataclass(frozen=True)
class Matrices:
    """Of one product: y += scale · B (A x). A's rows are the ranks of the product's first layer, then of the next ones."""

    inner: Tensor  # A, fp16 [rank, padded], fragment order
    outer: Tensor  # B, fp16 [N, most], in the order of the weight's rows: of each output the ranks of its own layer, then zeros
    owner: Tensor  # int64 [N]: the layer of each output; -1 for padding
    ranks: tuple[int, ...]  # of each layer
    scale: float

    def of_rows(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """B A x of x fp16 [T, padded] -> fp32 [T, N]; or of [T, K], with the place of each input in fragment order."""
        inner = self.inner if positions is None else self.inner[:, positions.long()]
        own = [torch.where(self.owner[:, None] == at, self.outer[:, :rank].float(), 0.0) for at, rank in enumerate(self.ranks)]
        return (x.float() @ inner.float().T).mul_(self.scale) @ torch.cat(own, 1).T

    def entry(self, widths: Sequence[int]) -> bytes:
        """What the kernels are given."""
        ends = [sum(widths[: at + 1]) for at in range(2)]
        first = [sum(self.ranks[:at]) for at in range(3)]
        return _ENTRY.pack(
            self.inner.data_ptr(), self.outer.data_ptr(), len(self.inner), self.outer.shape[1], *ends, *first, self.scale
        )  # fmt: skip


class CudaAdapter:
    """y += sum of w B (A x) over adapters with weights w."""

    def __init__(
        self,
        adapters: Sequence[tuple[Mapping[str, Part], float]],  # of lora.read, with their weights
        adaptable: Mapping[int, Adaptable],
        layers: Sequence[Layer],
    ) -> None:
        """Raises BadCheckpoint for a module that is not among `adaptable`, and for ranks of more than MOST_RANK together."""
        found: dict[tuple[int, str], list[tuple[Adaptable, Tensor, Tensor]]] = {}
        for parts, weight in adapters:
            for name, (module, inner, outer) in parts.items():
                own = adaptable.get(id(module))
                if own is None:
                    raise BadCheckpoint(
                        f"The adapter changes {name}, which is no linear layer of a block. It can only be given for the whole "
                        "model: set it as the option LoRA adapter in the Model tab."
                    )
                found.setdefault((own.layer, own.role), []).append((own, inner, outer.float() * weight))
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
                made = self.matrices.get((at, role))
                entries += made.entry(found[at, role][0][0].widths) if made is not None else bytes(_ENTRY.size)
        self.table = torch.frombuffer(entries, dtype=torch.uint8).to(layers[0].qkv.words.device)
        """uint8 [layers * roles * ENTRY_BYTES]: an entry for each layer and role."""

    @property
    def address(self) -> int:
        """Of its table on the GPU."""
        return self.table.data_ptr()

    @property
    def size_bytes(self) -> int:
        return self.table.numel() + sum(2 * (each.inner.numel() + each.outer.numel()) for each in self.matrices.values())


def _matrices(changes: Sequence[tuple[Adaptable, Tensor, Tensor]], layer: Layer, role: str) -> Matrices:
    weight = layer.weights[ROLES.index(role)]
    device, widths = weight.words.device, changes[0][0].widths
    own = [[(a, b) for each, a, b in changes if each.index == index] for index in range(len(widths))]
    ranks = tuple(sum(len(a) for a, _b in each) for each in own)
    inner = torch.cat([a.float().to(device) for each in own for a, _b in each])  # [rank, K]
    most = -(-max(ranks) // 8) * 8  # a lane reads eight
    outer = torch.zeros(sum(widths), most, device=device)  # outputs in the model's order
    for index, each in enumerate(own):
        first, at = sum(widths[:index]), 0
        for a, b in each:
            outer[first : first + len(b), at : at + len(a)] = b.to(device)
            at += len(a)
    owner = torch.arange(len(widths), device=device).repeat_interleave(torch.tensor(widths, device=device))
    columns = torch.arange(weight.out_features, device=device) if role != "gate_up" else gate_up_columns(layer.down)
    inner = torch.where(weight.order >= 0, inner[:, weight.order.clamp(min=0).long()], 0.0)
    outer = torch.where(columns[:, None] >= 0, outer[columns.clamp(min=0)], 0.0)
    owner = torch.where(columns >= 0, owner[columns.clamp(min=0)], -1)
    largest = [float(each.abs().max()) or 1.0 for each in (inner, outer)]
    halves = [(each / size).half().contiguous() for each, size in zip((inner, outer), largest, strict=True)]
    return Matrices(halves[0], halves[1], owner, ranks, largest[0] * largest[1])
