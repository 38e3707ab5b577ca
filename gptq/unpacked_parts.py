"""Layers that a file holds one by one and in 16 bits, and transformers as parts of a larger weight: single experts, and the
parts of joined layers. Writers leave them beside packed ones, or leave all of a layer.

transformers 5 stacks single experts only where it knows their names and all of them are there. Else they become linear layers
of PackedExperts; those of joined layers (joined_layers.py) stand in their places until they are read.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..core.errors import BadCheckpoint
from ..core.old_names import name_now
from ..core.safetensors_header import TensorInfo
from .dense_layers import replace
from .experts import ROLES, PackedExperts, expert_bias, expert_shape, experts_of, is_dense_experts, require_complete
from .joined_layers import JOINED
from .module_names import conversions_of, module_names_of

_FLOATS = ("F16", "BF16", "F32")
_PARTS = {*JOINED, *(part for parts in JOINED.values() for part in parts)}
# before it asks the quantizer about them, transformers 5 joins single experts whatever else there is
NEEDS_OTHER_NAMES = find_spec("transformers.conversion_mapping") is not None and not hasattr(
    HfQuantizer, "update_weight_conversions"
)
_OF_EXPERTS = re.compile(r"experts\\?\.(\*|\\d\+)")  # in a converter's pattern: the number of an expert


@dataclass(frozen=True)
class UnpackedLayer:
    in_features: int
    out_features: int
    has_bias: bool

    def linear(self, dtype: torch.dtype) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, self.has_bias, device="meta", dtype=dtype)
        return layer.requires_grad_(False)


def unpacked_layers(
    tensors: Mapping[str, tuple[Path, TensorInfo]], renamed: Mapping[str, str] | None = None
) -> dict[str, UnpackedLayer]:
    """Layer name -> layer, for every layer in 16 (or 32) bits that may be a part of a larger one, or hold several: by its name.

    `renamed`: patterns in names of 2023 -> what stands there now."""
    found = {}
    for key, (_path, info) in tensors.items():
        name = key.removesuffix(".weight")
        if name == key or len(info.shape) != 2 or info.dtype not in _FLOATS:
            continue
        if experts_of(name) or name_now(name, renamed or {}).rpartition(".")[2] in _PARTS:
            found[name] = UnpackedLayer(info.shape[1], info.shape[0], f"{name}.bias" in tensors)
    return found


def place_experts(model: PreTrainedModel, packed: Iterable[str], unpacked: Mapping[str, UnpackedLayer]) -> bool:
    """Put PackedExperts in the place of stacked ones whose layers the files hold one by one.

    `packed`: places in the model; `unpacked`: by the name in the files. Returns whether transformers joins the latter itself.
    Raises BadCheckpoint.
    """
    modules = dict(model.named_modules())

    def owners(names: Iterable[str]) -> set[str]:
        return {owner for place in names if (owner := experts_of(place)) and is_dense_experts(modules.get(owner))}

    packed, by_owner = list(packed), defaultdict[str | None, list[str]](list)
    for place in packed:
        by_owner[experts_of(place)].append(place)
    place_of = module_names_of((name for name in unpacked if experts_of(name)), model)
    found, further = owners(packed), owners(place_of.values())
    joins = not further or (not found & further and _are_joined(model, place_of))
    for owner in sorted(found if joins else found | further):
        dense = modules[owner]
        experts = PackedExperts(dense)
        own = {} if joins else {place: unpacked[name] for name, place in place_of.items() if experts_of(place) == owner}
        require_complete(experts, owner, [*by_owner[owner], *own])
        for place, layer in own.items():
            if (layer.in_features, layer.out_features) != (shape := expert_shape(dense, place)):
                raise BadCheckpoint(
                    f"{place} is {layer.in_features}×{layer.out_features} in the files and {shape[0]}×{shape[1]} in "
                    "config.json. The files belong to another model; download it again."
                )
            if expert_bias(dense) and not layer.has_bias:
                raise BadCheckpoint(f"{place} has no bias in the files, and its architecture has one. Download the model again.")
            at, _dot, role = place.removeprefix(f"{owner}.").partition(".")
            linear = layer.linear(dense.down_proj.dtype)
            experts.get_submodule(at).add_module(role, Held(linear) if NEEDS_OTHER_NAMES else linear)
        replace(model, owner, experts)
    return joins


def place_parts(model: PreTrainedModel, joined: Mapping[str, str], place_of: Mapping[str, UnpackedLayer]) -> None:
    """Put the unpacked parts of joined layers beside them. `joined`: part -> joined layer. Raises BadCheckpoint."""
    for place, layer in place_of.items():
        if place in joined:
            weight: Any = model.get_submodule(joined[place]).weight
            if layer.in_features != weight.shape[1]:
                raise BadCheckpoint(
                    f"{place} has {layer.in_features} inputs in the files and {weight.shape[1]} in config.json. "
                    "The files belong to another model; download it again."
                )
            replace(model, place, layer.linear(weight.dtype))


def _are_joined(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether transformers finds the stacked weight that each of these layers is a part of."""
    known, conversions = set(model.state_dict()), conversions_of(model)
    for name in names:
        key = f"{name}.weight"
        for each in conversions:
            key, _pattern = each.rename_source_key(key)
        if key not in known and f"{model.base_model_prefix}.{key}" not in known:
            return False
    return True


class Held(nn.Module):
    """A layer under a name that transformers joins with no others, until it is read."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held


def other_names() -> list[Any]:
    """For transformers' loader: single experts in 16 bits go to their `Held`."""
    from transformers.core_model_loading import WeightRenaming

    roles = "|".join(ROLES)
    return [WeightRenaming(source_patterns=rf"(\.experts\.\d+\.(?:{roles}))\.(?=weight$|bias$)", target_patterns=r"\1.held.")]


def release_held(model: PreTrainedModel) -> None:
    """Once the files are read, put the layers where they are computed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Held):
            replace(model, name, module.held)


def without_experts(conversions: Iterable[Any]) -> list[Any]:
    """transformers' conversions, but for those that join single experts."""
    return [
        each
        for each in conversions
        if not (hasattr(each, "operations") and any(_OF_EXPERTS.search(str(source)) for source in each.source_patterns))
    ]
