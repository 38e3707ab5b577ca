"""Which layers of a model are quantised: linear layers of its decoder and of experts, not the routers; and what is left."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import BadParameter, LoadFailed
from .expert_hessians import is_router, linear_experts, stacked
from .hessians import as_rows
from .hub_names import HubNames
from .quantize import decoder_layers, layers_to_pack

_EXAMPLES = 3  # names of layers in a sentence


@dataclass(frozen=True)
class Leave:
    """What stays in 16 bits though it could be packed."""

    patterns: Sequence[str] = ()  # regular expressions: a layer stays whose name has one in it
    names: Collection[str] = ()  # of layers, as files have them

    def __bool__(self) -> bool:
        return bool(self.patterns or self.names)


def wanted_layers(model: nn.Module, leave: Leave | None = None) -> dict[str, nn.Module]:
    """Every layer that is packed, by name: linear layers without routers, and each expert's. Weights of experts are views.

    Raises LoadFailed for a model without such layers, or with experts that cannot be taken apart; BadParameter for a pattern of
    `leave` that no layer has, or that leaves none.
    """
    found = {name: module for name, module in layers_to_pack(model).items() if not is_router(model, name)}
    for owner, module in stacked(model).items():
        experts = {
            f"{owner}.{name}": each for name, each in linear_experts(module).named_modules() if isinstance(each, nn.Linear)
        }
        for name, each in experts.items():
            if any(size % 32 for size in each.weight.shape):
                raise LoadFailed(
                    f"{name} is {each.in_features}×{each.out_features}; the layers of experts can be packed only in multiples "
                    "of 32. Choose another model."
                )
        found |= experts
    return _without_left(model, found, leave) if leave else found


def _without_left(model: nn.Module, found: dict[str, nn.Module], leave: Leave) -> dict[str, nn.Module]:
    names = HubNames(model)
    named = {name: (name, names.layer(name)) for name in found}
    examples = ", ".join(list(found)[:_EXAMPLES])
    left = {name for name, both in named.items() if both[1] in leave.names}
    for pattern in leave.patterns:
        try:
            of_pattern = {name for name, both in named.items() if any(re.search(pattern, each) for each in both)}
        except re.error as error:
            raise BadParameter(f"{pattern!r} is no regular expression: {error}. Write a part of a layer's name.") from error
        if not of_pattern:
            raise BadParameter(f"No layer that is packed has {pattern!r} in its name. Write a part of such names: {examples}.")
        left |= of_pattern
    if len(left) == len(found):
        raise BadParameter("Every layer would stay in 16 bits. Leave fewer of them.")
    return {name: module for name, module in found.items() if name not in left}


def left_dense(model: nn.Module, others: Iterable[str] = (), leave: Leave | None = None) -> str:
    """A sentence about the matrices that stay in 16 bits. `others` are packed beside the wanted layers."""
    every, wanted = wanted_layers(model), wanted_layers(model, leave)
    packed = {f"{name}.weight" for name in (*wanted, *others)}
    experts = tuple(f"{owner}." for owner in stacked(model))
    left: dict[str, int] = {}
    total = sum(tensor.numel() for tensor in model.parameters())
    matrices: dict[str, Any] = {
        name: tensor for name, tensor in model.named_parameters() if not name.startswith(experts) and tensor.dim() >= 2
    }
    matrices |= {f"{name}.weight": module.weight for name, module in every.items() if name.startswith(experts)}
    for name, tensor in matrices.items():
        if name in packed:
            continue
        short = re.sub(r"\.\d+(?=\.)", "", name).removesuffix(".weight")
        left[short] = left.get(short, 0) + tensor.numel()
    if not left:
        return "All matrices are packed."
    return f"Stay in 16 bits ({sum(left.values()) / total:.1%} of the weights): {', '.join(left)}."


def left_rules(model: nn.Module, leave: Leave) -> dict[str, Any]:
    """What `leave` keeps in 16 bits as entries of `dynamic` in quantize_config.json: GPTQModel and vLLM match a pattern from a
    name's beginning."""
    names = HubNames(model)
    left = {names.layer(name) for name in wanted_layers(model).keys() - wanted_layers(model, leave).keys()}
    found: dict[str, Any] = {f"-:.*(?:{each})": {} for each in leave.patterns}
    others = (name for name in sorted(left) if not any(re.search(each, name) for each in leave.patterns))
    return found | {f"-:{re.escape(name)}$": {} for name in others}


def packed_inside(model: nn.Module, packed: Iterable[str], left: Iterable[str]) -> list[list[str]]:
    """The layers that are packed, as `modules_in_block_to_quantize` lists them; empty where readers find them without it.

    `packed` and `left` (linear layers that are not packed) are names in files. A name is that inside of a decoder layer, or
    the whole name where a layer is packed in one decoder layer and not in another (vLLM and transformers read both).
    """
    packed, left = sorted(packed), list(left)
    if not left and not any(".experts." in name for name in packed):
        return []
    block = re.compile(rf"{re.escape(decoder_layers(model)[0])}\.\d+\.")
    inside = {block.sub("", name, count=1) for name in packed if block.match(name)}
    if inside & {block.sub("", name, count=1) for name in left if block.match(name)}:
        return [[name] for name in packed if block.match(name)]
    return [[name] for name in sorted(inside)]


def inputs_of(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Name -> inputs."""
    return {name: int(as_rows(module).shape[0]) for name, module in layers.items()}
