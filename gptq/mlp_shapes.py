"""What does not fit together in an MLP or a mixture of experts, for suitability.py; in words, empty if all fits."""

import math

import torch
from torch import Tensor, nn

from .families.parts import ExpertParts
from .gptq_linear import GPTQLinear


def uneven_mlp(gate_up: tuple[nn.Module, ...], down: nn.Module | None, hidden: int, gated: bool) -> str:
    if down is None:
        return "layers without an MLP"
    inner = inputs(down)
    fitting = ([inner] * 2, [2 * inner]) if gated else ([inner],)
    if [outputs(each) for each in gate_up] not in fitting or any(inputs(each) != hidden for each in gate_up):
        return "layers whose gate and up are not as wide as the input of down"
    return "" if outputs(down) == hidden else "layers whose outputs are not as wide as the residual"


def uneven_experts(mixture: ExpertParts, shared: bool, hidden: int, gated: bool) -> str:
    count = len(mixture.experts)
    if not 1 <= mixture.choices <= count:
        return f"{mixture.choices} experts for each token, of {count}"
    if (inputs(mixture.router), outputs(mixture.router)) != (hidden, count):
        return "a router that does not fit the experts"
    if not is_vector(mixture.choice_bias, count) or not math.isfinite(mixture.scale):
        return "a choice of experts by numbers that do not fit them"
    of_group = count // mixture.groups if mixture.groups > 0 and count % mixture.groups == 0 else 0
    if not (0 < mixture.chosen_groups <= mixture.groups and 0 < mixture.group_best <= of_group) or (
        mixture.choices > mixture.chosen_groups * of_group
    ):
        return "groups of experts that do not fit them"
    if mixture.in_turns and any(outputs(each) % 2 for one in mixture.experts for each in one.gate_up):
        return "gates and ups in turns, in an odd number"
    gate = mixture.shared_gate
    if gate is not None and (not shared or (inputs(gate), outputs(gate)) != (hidden, 1)):
        return "a weight of the shared expert that does not fit it"
    if any(not isinstance(each, GPTQLinear) for one in mixture.experts for each in (*one.gate_up, one.down)):
        return "experts that are not packed"
    if len({(len(each.gate_up), inputs(each.down)) for each in mixture.experts}) > 1:
        return "experts of different sizes"
    return next((found for each in mixture.experts if (found := uneven_mlp(each.gate_up, each.down, hidden, gated))), "")


def kind_of(mixture: ExpertParts) -> tuple[object, ...]:
    """What the mixtures of all layers have in common."""
    first = mixture.experts[0]
    how = mixture.choices, mixture.sigmoid, mixture.normed, mixture.scale, mixture.shared_gate is None
    groups = mixture.groups, mixture.chosen_groups, mixture.group_best
    return len(mixture.experts), len(first.gate_up), inputs(first.down), mixture.weighs_input, mixture.in_turns, *how, *groups


def reorders(columns: Tensor, widths: list[int]) -> bool:
    """Whether columns name each output once, and none of one layer stands among those of another."""
    if tuple(columns.shape) != (sum(widths),) or columns.dtype != torch.int64:
        return False
    start = 0
    for width in widths:
        if not torch.equal(columns[start : start + width].sort().values.cpu(), torch.arange(start, start + width)):
            return False
        start += width
    return True


def inputs(linear: nn.Module) -> int:
    return int(linear.in_features)  # type: ignore[arg-type]


def outputs(linear: nn.Module) -> int:
    return int(linear.out_features)  # type: ignore[arg-type]


def is_vector(tensor: Tensor | None, width: int) -> bool:
    """Whether a tensor is [width], or there is none."""
    return tensor is None or tuple(tensor.shape) == (width,)
