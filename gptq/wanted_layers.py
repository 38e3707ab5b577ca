"""Which layers of a model are quantised: linear layers of its decoder and of experts, not the routers; and what is left."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..core.errors import BadParameter, LoadFailed
from ..core.quantize_config import QuantizeConfig
from .expert_hessians import is_router, linear_experts, stacked
from .hessians import as_rows
from .quantize import layers_to_pack


def wanted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that is packed, by name: linear layers without routers, and each expert's. Weights of experts are views.

    Raises LoadFailed for a model without such layers, or with experts that cannot be taken apart.
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
    return found


def left_dense(model: nn.Module, others: Iterable[str] = ()) -> str:
    """A sentence about the matrices that stay in 16 bits. `others` are packed beside the wanted layers."""
    packed = {f"{name}.weight" for name in (*wanted_layers(model), *others)}
    experts = tuple(f"{owner}." for owner in stacked(model))
    left: dict[str, int] = {}
    total = 0
    for name, tensor in model.named_parameters():
        total += tensor.numel()
        if name in packed or name.startswith(experts) or tensor.dim() < 2:  # no norms
            continue
        short = re.sub(r"\.\d+(?=\.)", "", name).removesuffix(".weight")
        left[short] = left.get(short, 0) + tensor.numel()
    if not left:
        return "All matrices are packed."
    return f"Stay in 16 bits ({sum(left.values()) / total:.1%} of the weights): {', '.join(left)}."


def check_fits(linears: Mapping[str, nn.Module], configs: Iterable[QuantizeConfig]) -> None:
    """Raises BadParameter before any work is done."""
    for config in configs:
        for name, module in linears.items():
            rows = as_rows(module).shape[0]
            if config.group_size > 0 and rows % config.group_size:
                fitting = [
                    str(size) for size in (128, 64, 32) if all(as_rows(each).shape[0] % size == 0 for each in linears.values())
                ]
                raise BadParameter(
                    f"A group size of {config.group_size} does not divide the {rows} inputs of {name}; other programs would not "
                    f"open the model. Choose {' or '.join([*fitting, '-1 (no groups)'])}."
                )
