"""Layers that a file holds as one and transformers as several: qkv_proj for q_proj, k_proj and v_proj, one after the other.

While the files are read, the layer has the name of the file; then it is cut into the parts. Each keeps its own columns, bit for
bit, and the order of the inputs is that of all.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import BadCheckpoint
from . import bit_packing
from .gptq_linear import GPTQLinear
from .joined_layers import JOINED


def parts_in_model(place: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Name -> layer of the model, for each part of a layer of the files that the model has no place for; {} if it has not all."""
    owner, _dot, last = place.rpartition(".")
    found = {each: modules.get(f"{owner}.{each}") for each in JOINED.get(last, ())}
    return {name: each for name, each in found.items() if isinstance(each, nn.Linear)} if None not in found.values() else {}


def hold_cut(model: PreTrainedModel, place: str, parts: Mapping[str, nn.Linear], packed: GPTQLinear) -> nn.Module:
    """Put a packed layer in the place of its parts until `cut_layers`; returns the parent."""
    owner, _dot, last = place.rpartition(".")
    parent = model.get_submodule(owner)
    for name in parts:
        delattr(parent, name)
    vars(packed)["cut_into"] = {name: each.out_features for name, each in parts.items()}
    parent.add_module(last, packed)
    return parent


def cut_layers(model: nn.Module) -> None:
    """Once the files are read and prepared, put the parts where they are computed. Raises BadCheckpoint."""
    for name, packed in list(model.named_modules()):
        if not isinstance(packed, GPTQLinear) or "cut_into" not in vars(packed):
            continue
        owner, _dot, last = name.rpartition(".")
        parent = model.get_submodule(owner)
        if packed.qweight.is_meta:
            raise BadCheckpoint(
                f"{name} is one layer in the files and several in the model, and cannot be cut while it moves between processor "
                "and GPU. Load it on one device: set the device, or choose a smaller model."
            )
        delattr(parent, last)
        at = 0
        for part, width in vars(packed)["cut_into"].items():
            parent.add_module(part, _part(packed, at, at + width))
            at += width


@torch.no_grad()
def _part(packed: GPTQLinear, start: int, end: int) -> GPTQLinear:
    """The layer of some outputs alone."""
    bias = packed.bias
    part = GPTQLinear(
        packed.in_features, end - start, packed.bits, packed.group_size, checkpoint_format="gptq_v2", bias=bias is not None,
        dtype=packed.scales.dtype, device="meta",
    )  # fmt: skip
    zeros = bit_packing.true_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    tensors = {
        "qweight": packed.qweight[:, start:end],
        "qzeros": bit_packing.pack_columns(zeros[:, start:end], packed.bits),
        "scales": packed.scales[:, start:end],
        "g_idx": packed.g_idx,
        "bias": None if bias is None else bias[start:end],
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(part, name, nn.Parameter(tensor.contiguous().clone(), requires_grad=False))
    part.prepare()
    return part
