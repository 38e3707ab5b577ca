"""Rotations of query and key that a model's own forward makes of a prompt, or of a token of each of several conversations, by one
kernel for each layer.

Every architecture has a function of its own for them, which computes it in some ten operations. What it does is found by trying
it with random angles.
"""

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .gpu_kernels import Gpu
from .kernel_arguments import TURN_ROWS
from .natural_order import NUMBERS
from .prompt_rows import suffix
from .token_attention import capturing
from .token_rows import difference, rotated_dims

log = logging.getLogger(__name__)

ROTATION = "apply_rotary_pos_emb"
# Of `rotate` in layer_kernels.cu: halves turn together; neighbours, by one angle; by two; neighbours that then lie apart.
KINDS = range(4)
_Turn = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class TurnedRows:
    """Of one model, whose kernels are compiled."""

    def __init__(self, model: nn.Module, gpu: Gpu) -> None:
        sources = {sys.modules.get(type(each).__module__) for each in model.modules()}
        self._sources = [each for each in sources if callable(getattr(each, ROTATION, None))]
        self._gpu = gpu
        self._kinds: dict[Any, int | None] = {}
        self._thread = threading.get_ident()  # that computes with the kernel

    def take(self, undo: ExitStack) -> None:
        """Rotate by the kernel until `undo` is closed."""
        self._thread = threading.get_ident()
        for source in self._sources:
            original = getattr(source, ROTATION)
            setattr(source, ROTATION, self._rotation(original))
            undo.callback(setattr, source, ROTATION, original)

    def _rotation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rotated(*args: Any, **given: Any) -> Any:
            usual = len(args) == 4 and given.get("unsqueeze_dim", 1) == 1 and given.get("position_ids") is None
            if usual and set(given) <= {"unsqueeze_dim", "position_ids"} and self._is_ours(args[0]) and _can_turn(*args):
                q, k, cos, sin = args
                key = (original, q.shape[1], k.shape[1], q.shape[3], cos.shape[2], q.dtype)
                if key not in self._kinds and not capturing():
                    self._kinds[key] = kind_of(original, self._turn, q, k, cos)
                if (kind := self._kinds.get(key)) is not None:
                    return self._turn(q, k, cos, sin, kind)
            return original(*args, **given)

        return rotated

    def _is_ours(self, q: Any) -> bool:
        """Other models of the architecture may run in other threads, and on other GPUs, meanwhile."""
        return (
            isinstance(q, Tensor) and threading.get_ident() == self._thread and not (torch.is_grad_enabled() and q.requires_grad)
        )

    def _turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        if apart := q.shape[0] > 1:
            q, k, cos, sin = _as_prompt(q, k, cos, sin)
        (_one, heads, rows, dims), kv_heads, angles = q.shape, k.shape[1], cos.shape[2]
        q_out, k_out = (torch.empty(1, rows, each.shape[1], dims, dtype=q.dtype, device=q.device) for each in (q, k))
        rotated = rotated_dims(dims, angles, kind)
        if rotated % 4:
            raise ValueError(f"{rotated} rotated dimensions")
        arguments = TURN_ROWS.pack(
            q=q, k=k, cosines=cos, sines=sin, q_out=q_out, k_out=k_out, q_row=q.stride(2), q_head=q.stride(1), k_row=k.stride(2),
            k_head=k.stride(1), cos_row=cos.stride(1), sin_row=sin.stride(1), heads=heads, kv_heads=kv_heads, d=dims,
            rotated=rotated, angles=angles, kind=kind,
        )  # fmt: skip
        self._gpu.run(f"turn_rows_{suffix(q.dtype)}", (rows,), 256, arguments, overlap=True)
        out = q_out.transpose(1, 2), k_out.transpose(1, 2)
        return (out[0].transpose(0, 2), out[1].transpose(0, 2)) if apart else out


def _as_prompt(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The tokens of several conversations as those of one."""
    return q.transpose(0, 2), k.transpose(0, 2), cos.transpose(0, 1), sin.transpose(0, 1)


def kind_of(original: Callable[..., Any], turn: _Turn, q: Tensor, k: Tensor, cos: Tensor) -> int | None:
    """Which dimensions a rotation turns together, by random angles; None if it is of no known kind."""
    generator = torch.Generator(q.device).manual_seed(0)

    def some(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)

    q, k, cos, sin = some(q), some(k), some(cos), some(cos)
    try:
        wanted = original(q, k, cos, sin)
        for kind in KINDS:
            found = turn(q, k, cos, sin, kind)
            if all(a.shape == b.shape and difference(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True)):
                return kind
    except (RuntimeError, ValueError, TypeError, IndexError):
        pass
    log.info("%s of %s is not of a known kind", ROTATION, getattr(original, "__module__", "?"))
    return None


def _can_turn(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Whether the kernel rotates heads [1, heads, T, D] by angles [1, T, up to D], or [T, heads, 1, D] by [T, 1, up to D]."""
    if not all(isinstance(each, Tensor) for each in (q, k, cos, sin)) or q.dim() != 4 or k.dim() != 4:
        return False
    if q.shape[0] > 1:
        if cos.dim() != 3 or sin.dim() != 3:
            return False
        q, k, cos, sin = _as_prompt(q, k, cos, sin)
    if not q.is_cuda or q.shape[0] != 1 or q.shape[2] < 2 or k.shape != (1, k.shape[1], *q.shape[2:]):
        return False
    if cos.shape != sin.shape or cos.shape != (1, q.shape[2], cos.shape[-1]) or cos.shape[2] % 2 or cos.shape[2] > q.shape[3]:
        return False
    if q.dtype not in NUMBERS or not q.dtype == k.dtype == cos.dtype == sin.dtype or q.shape[3] % 2 or q.shape[3] > 512:
        return False
    if any(each.stride(3) != 1 or each.stride(1) % 2 or each.stride(2) % 2 or each.data_ptr() % 4 for each in (q, k)):
        return False
    return cos.stride(2) == sin.stride(2) == 1
