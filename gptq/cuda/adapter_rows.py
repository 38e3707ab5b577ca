"""Launching what LoRA adapters add to a step's products (adapter_rows.cu)."""

from torch import Tensor

from .gpu_kernels import Gpu
from .kernel_arguments import ADAPTER_IN, ADAPTER_OUT, ADAPTER_SILU

MOST_RANK = 1024  # of the adapters of one row together
_IN_BYTES = 128  # shared memory of a block: two sums of each warp


def inner(
    gpu: Gpu, adapters: Tensor, entry: int, rank: int, x: Tensor, t: Tensor, norm: Tensor | None, inputs: int, eps: float
) -> None:
    """A x of each row's adapter -> t fp32 [rows, MOST_RANK]. x fp16 [rows, padded] in fragment order.

    `adapters` int64 [rows]: addresses of tables, 0 for none; `entry` of a table is used. `rank`: the largest of them. With `norm`
    fp16 [padded], x is normed first, over its `inputs` numbers without padding.
    """
    rows, padded = x.shape
    arguments = ADAPTER_IN.pack(
        adapters=adapters, x=x, norm=norm, t=t, entry=entry, padded=padded, k=inputs, most=MOST_RANK, eps=eps
    )  # fmt: skip
    name = "adapter_in_plain" if norm is None else "adapter_in_norm"
    gpu.run(name, (rank, rows), 512, arguments, _IN_BYTES, overlap=True)


def outer(
    gpu: Gpu,
    adapters: Tensor,
    entry: int,
    rank: int,
    t: Tensor,
    out: Tensor | None,
    residual: Tensor | None = None,
    permutation: Tensor | None = None,
) -> None:
    """Add B t to out fp16 [rows, N]; or to residual fp32 [rows, N], and then write the sums to `out` [rows, padded] in the order
    of `permutation` [N], if there is one. N is even."""
    sums = residual if residual is not None else out
    assert sums is not None
    rows, n = sums.shape
    arguments = ADAPTER_OUT.pack(
        adapters=adapters, t=t, out=out, residual=residual, permutation=permutation, entry=entry, n=n,
        padded=out.shape[1] if out is not None else 0, most=MOST_RANK,
    )  # fmt: skip
    gpu.run("adapter_out", (-(-n // 512), rows), 256, arguments, 8 * rank, overlap=True)


def silu(gpu: Gpu, adapters: Tensor, entry: int, rank: int, t: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """SiLU(gate) * up of gate_up fp16 [rows, 2 * padded], 8 of each in turn, with B t added first -> out fp16 [rows, padded]."""
    rows, padded = out.shape
    arguments = ADAPTER_SILU.pack(
        adapters=adapters, t=t, gate_up=gate_up, out=out, entry=entry, padded=padded, most=MOST_RANK
    )  # fmt: skip
    gpu.run("adapter_silu", (-(-padded // 512), rows), 256, arguments, 8 * rank, overlap=True)
