"""Which tensors of one token the kernels in the place of transformers' own take."""

from typing import Any

from torch import Tensor

from .fused_norms import MOST
from .natural_order import NUMBERS
from .token_attention import of_one_token


def rows_of_one_token(x: Any, addend: Any) -> bool:
    """Whether two tensors can be added by the kernel: the same [1, 1, K] or [1, K]."""
    if not isinstance(x, Tensor) or not isinstance(addend, Tensor) or x.shape != addend.shape or x.dtype != addend.dtype:
        return False
    width = x.shape[-1] if x.dim() in (2, 3) else 0
    usual = x.is_cuda and x.dtype in NUMBERS and width >= 256 and width % 8 == 0 and width <= MOST and x.numel() == width
    return usual and x.is_contiguous() and addend.is_contiguous() and x.data_ptr() % 16 == addend.data_ptr() % 16 == 0


def can_rotate(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Whether the kernels rotate heads [1, heads, 1, D] of a token by angles [1, 1, up to D]."""
    if not all(isinstance(each, Tensor) for each in (q, k, cos, sin)) or q.dim() != 4 or k.dim() != 4:
        return False
    if not of_one_token(q, k) or q.shape[3] != k.shape[3] or cos.shape != sin.shape or cos.numel() != cos.shape[-1]:
        return False
    if not q.dtype == k.dtype == cos.dtype == sin.dtype or cos.shape[-1] % 2:
        return False
    return cos.shape[-1] <= q.shape[3] and cos.stride(-1) == sin.stride(-1) == 1


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-20))


def rotated_dims(dims: int, angles: int, kind: int) -> int:
    """How many dimensions of a head a rotation of this kind turns, the first ones."""
    return 2 * angles if kind == 0 and 2 * angles == dims else min(angles, dims)
