"""Activations that a product applies itself: which of them a module is, found by trying it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# The number of each is what `activated` in gemv.cu expects.
_KNOWN: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    lambda x: functional.gelu(x, approximate="tanh"),
    functional.gelu,
    functional.relu,
    lambda x: functional.relu(x).square(),
)


def number_of(activation: Any, device: torch.device) -> int | None:
    """The kernel's number of an activation module or function; None if the kernel does not have it."""
    x = torch.cat([torch.linspace(-9, 9, 1001, device=device), torch.linspace(-90, 90, 181, device=device)])  # one may be cut off
    try:
        found = activation(x.clone())
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    return next(
        (at for at, known in enumerate(_KNOWN) if float(((known(x) - found) / x.abs().clamp(min=1)).abs().max()) < 2e-5), None
    )


def apply(number: int, x: Tensor) -> Tensor:
    """The activation of that number, in plain PyTorch."""
    return _KNOWN[number](x)


def clamped_gate_of(shell: Any, device: torch.device) -> tuple[float, float] | None:
    """(alpha, limit) of a module whose `_apply_gate` is GPT-OSS's, found by trying it; None for another gate."""
    alpha, limit = getattr(shell, "alpha", None), getattr(shell, "limit", None)
    if not isinstance(alpha, (int, float)) or not isinstance(limit, (int, float)):
        return None
    x = torch.linspace(-1.5 * limit, 1.5 * limit, 1000, device=device)
    x = torch.stack([x, x.flip(0) * 0.9], -1).view(1, -1)
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    try:
        found = shell._apply_gate(x.clone())
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    wanted = (up + 1) * gate * torch.sigmoid(gate * alpha)
    if not isinstance(found, Tensor) or found.shape != wanted.shape or float((found - wanted).abs().max()) > 1e-4 * limit:
        return None
    return float(alpha), float(limit)
