"""Launching what is not a packed product (row_kernels.cu): embedding, norm, activation, output head."""

from torch import Tensor

from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import CONSTANTS, EMBED, HEAD, NORM, NORM_RUNS, ORDER, SILU, TILE
from .kernel_source import BLOCK_THREADS, NORM_INPUTS

_ORDERED_BYTES = 32 * 1024  # of the rows that a block orders together
_NATURAL_INPUTS = CONSTANTS["NATURAL_RUNS"] * 4  # of a thread
MOST_NATURAL = _NATURAL_INPUTS * BLOCK_THREADS  # inputs that one block norms in the model's own order
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
    gpu: Gpu, residual: Tensor, norm: Tensor, order: Tensor | None, out: Tensor, eps: float, addend: Tensor | None = None
) -> None:
    """Add `addend` fp16 [T, H] to residual fp32 [T, H]; RMSNorm of the sum -> out fp16 [T, padded], in the order of `order`, or
    without one [T, H] as it is, up to MOST_NATURAL inputs."""
    rows, hidden = residual.shape
    arguments = NORM.pack(
        residual=residual, addend=addend, norm=norm, out=out, order=order, k=hidden, padded=out.shape[1], eps=eps
    )  # fmt: skip
    if order is None:
        threads = -(-hidden // (_NATURAL_INPUTS * 32)) * 32
        gpu.run("norm_rows_natural", (rows,), threads, arguments, _SCRATCH_BYTES, overlap=True)
        return
    gpu.run("norm_rows", (rows,), 512, arguments, hidden * 4 + _SCRATCH_BYTES, overlap=True)


def order_rows(gpu: Gpu, x: Tensor, order: Tensor, out: Tensor) -> None:
    """x fp16 [T, K] -> out fp16 [T, padded], the inputs in the order of `order`. K is a multiple of 8."""
    rows, k = x.shape
    together = max(1, min(4, _ORDERED_BYTES // (k * 2)))
    arguments = ORDER.pack(x=x, out=out, order=order, rows=rows, k=k, padded=out.shape[1], together=together)
    gpu.run("order_rows", (-(-rows // together),), 256, arguments, together * k * 2, overlap=True)


def silu_rows(gpu: Gpu, gate_up: Tensor, out: Tensor) -> None:
    """SiLU(gate) * up of gate_up fp16 [T, 2 * inner], 8 of each in turn -> out fp16 [T, padded].

    Raises ValueError if `inner` or `padded` is no multiple of 8.
    """
    (rows, width), padded = gate_up.shape, out.shape[1]
    if width % 16 or padded % 8:
        raise ValueError(f"{width // 2} gates and {padded} outputs were given; both must be multiples of 8.")
    arguments = SILU.pack(gate_up=gate_up, out=out, inner=width // 2, padded=padded)
    gpu.run("silu_rows", (-(-padded // 2048), rows), 256, arguments, overlap=True)


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
    arguments = HEAD.pack(weights=weights, x=x, norm=norm, out=out, n=vocabulary, k=hidden, eps=eps, rows=1)
    outputs = threads // 16  # of a block at a time
    blocks = min(-(-vocabulary // outputs), 1024 // threads * gpu.processors)
    gpu.run("head", (blocks,), threads, arguments, hidden * 2 + _SCRATCH_BYTES, overlap=True)


_HEAD_ROWS_THREADS = 512
_HEAD_ROWS = ((2, 4), (4, 2), (8, 1), (8, 2))  # the kernels: rows, and pieces of 8 inputs of each that a thread norms


def _head_rows_kernel(gpu: Gpu, rows: int, hidden: int) -> tuple[str, int] | None:
    """(name, shared memory) of the kernel for so many rows; None if no block stages them."""
    for most, runs in _HEAD_ROWS:
        shared_bytes = most * (hidden + 32) * 2 + (32 * most + 8) * 4
        fits = hidden <= runs * 8 * _HEAD_ROWS_THREADS and shared_bytes <= gpu.shared_limit_bytes
        if rows <= most and fits and hidden % 32 == 0:
            return f"head_{most}_{runs}", shared_bytes
    return None


def has_head_rows(gpu: Gpu, rows: int, hidden: int) -> bool:
    """Whether `head_rows` computes so many."""
    return _head_rows_kernel(gpu, rows, hidden) is not None


def head_rows(gpu: Gpu, weights: Tensor, x: Tensor, norm: Tensor, out: Tensor, eps: float) -> None:
    """As `head`, of x fp16 [rows, H] -> out fp32 [rows, V]. Raises ValueError for more than it computes."""
    (vocabulary, hidden), rows = weights.shape, x.shape[0]
    found = _head_rows_kernel(gpu, rows, hidden)
    if found is None:
        raise ValueError(f"{rows} rows of {hidden} inputs are more than a block of the output layer stages.")
    name, shared_bytes = found
    arguments = HEAD.pack(weights=weights, x=x, norm=norm, out=out, n=vocabulary, k=hidden, eps=eps, rows=rows)
    blocks = min(-(-vocabulary // TILE), gpu.processors)
    gpu.run(name, (blocks,), _HEAD_ROWS_THREADS, arguments, claimed_bytes(gpu, shared_bytes, 1), overlap=True)
