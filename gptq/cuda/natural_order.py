"""Products whose input and output have the model's own order and numbers: what their kernels are asked for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cuda_weights import Weight, fragment_order, permutation_of

NUMBERS = (torch.float16, torch.bfloat16)  # that a kernel takes and gives as they are
LARGEST_HALF = torch.finfo(torch.float16).max  # 65,504
_MOST_INPUTS = (1 << 16) - 1  # an input's number has 16 bits


def order_of(weight: Weight) -> Tensor | None:
    """uint16 [padded]: the input at each position of the weight; None if they are in their own order.

    Tensors of 16 bits are int16 here, whose bits are those of the unsigned number.
    """
    plain = fragment_order(None, weight.in_features, weight.order.device)
    if torch.equal(plain, weight.order):
        return None
    if weight.in_features > _MOST_INPUTS:
        raise ValueError(f"{weight.in_features} inputs in an order of their own; {_MOST_INPUTS} have a number.")
    return torch.where(weight.order < 0, weight.in_features, weight.order).to(torch.int32).to(torch.int16).contiguous()


def input_of(dtype: torch.dtype, order: Tensor | None) -> str:
    """GemvVariant.input."""
    return ("NATURAL" if order is None else "ORDERED") + ("_BFLOAT" if dtype == torch.bfloat16 else "")


def epilogue_of(dtype: torch.dtype, applied: str = "") -> str:
    """GemvVariant.epilogue. `applied`: "GATED" or "ACTIVE" for a product that applies an activation."""
    if applied:
        return f"{applied}_BFLOAT" if dtype == torch.bfloat16 else applied
    return "BFLOAT" if dtype == torch.bfloat16 else "PLAIN"


def gate_columns(inner: int, device: torch.device) -> Tensor:
    """int64 [2 * inner]: the outputs of gate and up in turn, eight of each. `inner` is a multiple of 8."""
    gate = torch.arange(inner, device=device).view(-1, 8)
    return torch.cat([gate, gate + inner], 1).view(-1)


def gates_and_ups(y: Tensor) -> tuple[Tensor, Tensor]:
    """What the columns of `gate_columns` give [..., 2 * inner] -> two of [..., inner]."""
    both = y.unflatten(-1, (-1, 2, 8))
    return both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)


@dataclass(frozen=True, eq=False)
class Picked:
    """Which of `width` inputs each of a weight's inputs is, int64 [its inputs]; `width` for one that is zero."""

    sources: Tensor
    width: int

    def of(self, weight: Weight) -> Weight:
        taken = torch.where(weight.order < 0, self.width, self.sources[weight.order.clamp(min=0).long()])
        order = torch.where(taken < self.width, taken, -1).to(weight.order.dtype)
        return replace(weight, order=order, permutation=permutation_of(order, self.width), in_features=self.width)
