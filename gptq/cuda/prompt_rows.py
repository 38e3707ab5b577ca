"""Rows of a prompt between the products of transformers' own forward: in the order of a weight, and gated."""

import torch
from torch import Tensor

from .gpu_kernels import Gpu
from .kernel_arguments import GATE_ROWS, ORDER_INPUTS
from .kernel_source import LayerVariant
from .natural_order import NUMBERS

_MOST_INPUTS = 1 << 15  # of a row, in the shared memory of a block
_SCRATCH_BYTES = 16 + 32 * 4  # of a block: the number that padding names, a float for each warp


def has_kernels(gpu: Gpu) -> bool:
    return gpu.has(LayerVariant(False).name) and gpu.has(LayerVariant(True).name)


def can_order(width: int) -> bool:
    """Whether `order_inputs` takes rows of so many inputs."""
    return width % 8 == 0 and width <= _MOST_INPUTS


def order_inputs(
    gpu: Gpu,
    x: Tensor,
    order: Tensor,
    sources: Tensor | None = None,
    experts: Tensor | None = None,
    powers: Tensor | None = None,
) -> Tensor:
    """x [T, K] -> fp16 [rows, padded] in the order of a weight, int16 [1, padded], the number of inputs for padding.

    `sources` int32 [rows] names the row of x for each row. With `experts` int64 [rows] each has the order of its own expert,
    of those in `order` [experts, padded]. With `powers` fp32 [rows] each row is divided by a power of two, which is left there,
    so that its largest number is below 64; without, what fp16 does not hold becomes its largest number.
    """
    x = x if x.dtype in NUMBERS else x.to(torch.float16)
    x = x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    rows, padded = x.shape[0] if sources is None else sources.numel(), order.shape[1]
    out = torch.empty(rows, padded, dtype=torch.float16, device=x.device)
    arguments = ORDER_INPUTS.pack(
        x=x, out=out, order=order, sources=sources, sorted=experts, powers=powers, k=x.shape[1], padded=padded
    )
    threads = min(512, -(-padded // 256) * 32)
    gpu.run(f"order_inputs_{suffix(x.dtype)}", (rows,), threads, arguments, padded * 2 + _SCRATCH_BYTES, overlap=True)
    return out


def gate_rows(
    gpu: Gpu,
    y: Tensor,
    inner: int,
    activation: int,
    dtype: torch.dtype,
    powers: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y fp16 [rows, 2 * inner or more], eight gates and eight ups in turn -> activation(gate) * up, [rows, inner] of `dtype`.
    y is multiplied with `powers` fp32 [rows], then `bias` fp16 [y's columns] is added, where they are given."""
    out = torch.empty(y.shape[0], inner, dtype=dtype, device=y.device)
    arguments = GATE_ROWS.pack(
        y=y, out=out, powers=powers, bias=bias, inner=inner, width=y.shape[1], activation=activation
    )  # fmt: skip
    threads = min(256, -(-inner // 256) * 32)
    gpu.run(f"gate_rows_{suffix(dtype)}", (y.shape[0], -(-inner // (threads * 8))), threads, arguments, overlap=True)
    return out


def suffix(dtype: torch.dtype) -> str:
    return "bfloat" if dtype == torch.bfloat16 else "half"
