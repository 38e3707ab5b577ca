"""Layers that a file holds as one and transformers as several: qkv_proj for q_proj, k_proj and v_proj.

While the files are read, the layer has the name of the file; then it is cut into the parts. Each keeps its own columns, bit for
bit, and the order of the inputs is that of all. Most files hold the parts one after the other; those of some families of 2023
(core/old_families.py) have an order of their own, or a key head once where the model has it several times. What transformers cuts
while it reads 16-bit files (module_names.Split) is cut likewise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import BadCheckpoint
from ..core.successor import Successor
from . import bit_packing
from .families.reading import head_dim_of, split_by_head
from .gptq_linear import GPTQLinear
from .joined_layers import JOINED
from .module_names import splits_of

Joined = Mapping[str, tuple[str, ...]]
Cut = Mapping[str, Tensor]  # name of a part in the model -> its columns in the layer of the files


def joined_of(model: PreTrainedModel) -> Joined:
    """Last name of a layer of the files -> of its parts in the model: what any file may join, and what transformers cuts."""
    return JOINED | dict(each.joined for each in splits_of(model))


def cut_of(
    place: str, outputs: int, modules: Mapping[str, nn.Module], config: Any, old: Successor | None, joined: Joined = JOINED
) -> Cut:
    """How a layer of the files that has so many outputs is cut; {} if it stands in the model as it is, or has no place there."""
    if place not in modules and place.rpartition(".")[2] not in joined:
        return {}
    with torch.device("cpu"):  # transformers makes a model on meta
        return _cut_of(place, outputs, modules, config, old, joined)


def _cut_of(
    place: str, outputs: int, modules: Mapping[str, nn.Module], config: Any, old: Successor | None, joined: Joined
) -> Cut:  # fmt: skip
    owner, _dot, last = place.rpartition(".")
    whole = modules.get(place)
    if whole is not None:
        return _repeated(last, whole, outputs, config) if old is not None and old.repeats else {}
    found = {each: modules.get(f"{owner}.{each}") for each in joined.get(last, ())}
    parts = {name: each for name, each in found.items() if isinstance(each, nn.Linear)}
    if len(parts) < len(found):
        return {}
    widths = [each.out_features for each in parts.values()]
    columns = torch.arange(sum(widths))
    if old is not None and old.by_head and last == "qkv_proj":
        head_dim = head_dim_of(config)
        columns = split_by_head(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, head_dim)
    return dict(zip(parts, columns.split(widths), strict=True)) if len(columns) == sum(widths) else {}


def _repeated(last: str, whole: nn.Module, outputs: int, config: Any) -> Cut:
    """Keys or values of a layer with fewer heads than the model has: each stands for several that are the same."""
    head_dim, wanted = head_dim_of(config), getattr(whole, "out_features", 0)
    if last not in ("k_proj", "v_proj") or outputs in (0, wanted) or wanted % outputs or outputs % head_dim:
        return {}
    columns = torch.arange(outputs).view(-1, head_dim).repeat_interleave(wanted // outputs, 0)
    return {last: columns.reshape(-1)}


def width_of(place: str, cut: Cut, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """(inputs, outputs) that the layer of the files must have."""
    part: Any = modules[f"{place.rpartition('.')[0]}.{next(iter(cut))}"]
    return part.in_features, 1 + max(int(columns.max()) for columns in cut.values())


def hold_dense(model: PreTrainedModel, place: str, cut: Cut, modules: Mapping[str, nn.Module], shape: tuple[int, int]) -> None:
    """`hold_cut` of a layer that the files hold in 16 bits, of so many inputs and outputs. Raises BadCheckpoint."""
    part: Any = modules[f"{place.rpartition('.')[0]}.{next(iter(cut))}"]
    if (wanted := width_of(place, cut, modules)) != shape:
        raise BadCheckpoint(
            f"{place} is {shape[0]}×{shape[1]} in the files and {wanted[0]}×{wanted[1]} in config.json. "
            "The files belong to another model; download it again."
        )
    layer = nn.Linear(*shape, part.bias is not None, device="meta", dtype=part.weight.dtype)
    hold_cut(model, place, cut, layer.requires_grad_(False))


def hold_cut(model: PreTrainedModel, place: str, cut: Cut, layer: nn.Module) -> nn.Module:
    """Put a layer of the files in the place of its parts until `cut_layers`; returns the parent."""
    owner, _dot, last = place.rpartition(".")
    parent = model.get_submodule(owner)
    for name in cut:
        delattr(parent, name)
    vars(layer)["cut_into"] = dict(cut)
    parent.add_module(last, layer)
    return parent


def cut_layers(model: nn.Module) -> None:
    """Once the files are read and prepared, put the parts where they are computed. Raises BadCheckpoint."""
    for name, layer in list(model.named_modules()):
        if "cut_into" not in vars(layer):
            continue
        owner, _dot, last = name.rpartition(".")
        parent = model.get_submodule(owner)
        if any(each.is_meta for each in layer.parameters()):
            raise BadCheckpoint(
                f"{name} is one layer in the files and several in the model, and cannot be cut while it moves between processor "
                "and GPU. Load it on one device: set the device, or choose a smaller model."
            )
        delattr(parent, last)
        for part, columns in vars(layer)["cut_into"].items():
            parent.add_module(part, _part(layer, columns) if isinstance(layer, GPTQLinear) else _dense_part(layer, columns))


@torch.no_grad()
def _part(packed: GPTQLinear, columns: Tensor) -> GPTQLinear:
    """The layer of some outputs alone."""
    bias, columns = packed.bias, columns.to(packed.qweight.device)
    part = GPTQLinear(
        packed.in_features, len(columns), packed.bits, packed.group_size, checkpoint_format="gptq_v2", bias=bias is not None,
        dtype=packed.scales.dtype, device="meta",
    )  # fmt: skip
    zeros = bit_packing.true_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    tensors = {
        "qweight": packed.qweight[:, columns],
        "qzeros": bit_packing.pack_columns(zeros[:, columns], packed.bits),
        "scales": packed.scales[:, columns],
        "g_idx": packed.g_idx,
        "bias": None if bias is None else bias[columns],
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(part, name, nn.Parameter(tensor.contiguous().clone(), requires_grad=False))
    part.prepare()
    return part


@torch.no_grad()
def _dense_part(layer: Any, columns: Tensor) -> nn.Linear:
    columns = columns.to(layer.weight.device)
    part = nn.Linear(layer.in_features, len(columns), layer.bias is not None, device="meta")
    part.weight = nn.Parameter(layer.weight[columns].clone(), requires_grad=False)
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias[columns].clone(), requires_grad=False)
    return part
