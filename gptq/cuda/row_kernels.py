"""Launching what is not a packed product (row_kernels.cu): embedding, norm, activation, output head."""

from torch import Tensor

from .gpu_kernels import Gpu
from .kernel_arguments import EMBED, HEAD, NORM, NORM_RUNS, SILU
from .kernel_source import BLOCK_THREADS, NORM_INPUTS

_SCRATCH_BYTES = 160  # of a block: the sums of up to 33 warps, and what aligns them


def embed(gpu: Gpu, table: Tensor, ids: Tensor, permutation: Tensor, residual: Tensor, out: Tensor) -> None:
    """The embeddings of `ids` -> residual fp32 [rows, H] and out fp16 [rows, padded] in the order of `permutation` [H]."""
    rows, hidden = residual.shape
    arguments = EMBED.pack(
        table=table, ids=ids, residual=residual, out=out, permutation=permutation, k=hidden, padded=out.shape[1]
    )  # fmt: skip
    gpu.run("embed", (-(-hidden // 256), rows), 256, arguments, overlap=True)


def norm_shared_bytes(hidden: int) -> int:
    """Shared memory of a block that norms a row."""
    return hidden * 4 + _SCRATCH_BYTES


def norm_rows(
    gpu: Gpu, residual: Tensor, norm: Tensor, order: Tensor, out: Tensor, eps: float, addend: Tensor | None = None
) -> None:
    """Add `addend` fp16 [T, H] to residual fp32 [T, H]; RMSNorm of the sum -> out fp16 [T, padded], in the order of `order`."""
    rows, hidden = residual.shape
    arguments = NORM.pack(
        residual=residual, addend=addend, norm=norm, out=out, order=order, k=hidden, padded=out.shape[1], eps=eps
    )  # fmt: skip
    gpu.run("norm_rows", (rows,), 512, arguments, hidden * 4 + _SCRATCH_BYTES, overlap=True)


def silu_rows(gpu: Gpu, gate_up: Tensor, out: Tensor) -> None:
    """SiLU(gate) * up of gate_up fp16 [T, 2 * inner], 8 of each in turn -> out fp16 [T, padded]."""
    rows, width = gate_up.shape
    arguments = SILU.pack(gate_up=gate_up, out=out, inner=width // 2, padded=out.shape[1])
    gpu.run("silu_rows", (8, rows), 256, arguments)


def head_threads(hidden: int) -> int:
    """Threads of a block that stages `hidden` inputs: 256 for 8,192, more for more. Raises ValueError beyond a block."""
    if hidden > NORM_INPUTS:
        raise ValueError(f"The output layer has {hidden} inputs; a block stages {NORM_INPUTS} at most.")
    threads = 256
    while NORM_RUNS * 8 * threads < hidden:
        threads *= 2
    return min(threads, BLOCK_THREADS)


def head(gpu: Gpu, weights: Tensor, x: Tensor, norm: Tensor, out: Tensor, eps: float) -> None:
    """norm(x) W^T of x fp16 [H] and W fp16 [V, H] -> out fp32 [V]."""
    vocabulary, hidden = weights.shape
    threads = head_threads(hidden)
    arguments = HEAD.pack(weights=weights, x=x, norm=norm, out=out, n=vocabulary, k=hidden, eps=eps)
    outputs = threads // 16  # of a block at a time
    blocks = min(-(-vocabulary // outputs), 1024 // threads * gpu.processors)
    gpu.run("head", (blocks,), threads, arguments, hidden * 2 + _SCRATCH_BYTES, overlap=True)
