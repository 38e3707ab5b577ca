"""Rows of numbers that fp16 may not hold, for products of fp16: each is divided by a power of two of its largest number.

Numbers of bfloat16 reach far beyond 65,504, and far below what fp16 tells from zero. prompt_rows.py divides rows by a kernel.
"""

import torch
from torch import Tensor


def divided(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (fp16 [M, K], the largest number of a row below 64; what rows were divided by, powers of two, fp32 [M])."""
    exponents = (torch.frexp(x.abs().amax(1).float()).exponent - 6).clamp(-126, 122)
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return (x / powers[:, None]).to(torch.float16), powers


def multiplied(y: Tensor, powers: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What products y fp16 [M, N] of divided rows are of the rows as they were, with the bias [N]: [M, N] of `dtype`."""
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    if bias is None:
        return torch.mul(y, powers[:, None], out=out)
    return torch.addcmul(bias.float()[None], y, powers[:, None], out=out)
