"""Products of a single row: which kernel of gemv.cu computes them, and how it is launched."""

from dataclasses import dataclass

from torch import Tensor

from .cuda_kernels import Gemv, GemvVariant, Gpu, pointer
from .cuda_weights import Weight


@dataclass(frozen=True)
class Tuning:
    """How the product of a single row is spread over a card."""

    split: int = 8  # warps that share a tile
    batch: int = 2  # chunks of 4 bits that travel together; half as many of 8 bits
    stages: int = 4
    teams: int = 1  # tiles a block works on at once
    blocks_per_processor: int = 4


def variant(weight: Weight, epilogue: str, norm: bool, tuning: Tuning) -> GemvVariant:
    """The kernel for a weight. A norm needs enough threads for the whole input."""
    split, teams, vectors = tuning.split, tuning.teams, 0
    if norm:
        while (vectors := -(-weight.padded // (8 * 32 * split * teams))) > 4:
            split, teams = split * 2, 1
    batch = max(1, tuning.batch // 2) if weight.shape.bits == 8 else tuning.batch
    even = weight.chunks % (split * batch) == 0
    return GemvVariant(weight.shape, epilogue, vectors, split, batch, tuning.stages, teams, even)


def launch(
    gpu: Gpu,
    weight: Weight,
    plan: GemvVariant,
    blocks: int,
    x: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    permutation: Tensor | None = None,
    eps: float = 0.0,
    overlap: bool = False,
) -> None:
    """x fp16 [padded] in engine order -> out, as the epilogue of `plan` says (gemv.cu), which must be compiled.

    `blocks`: at most so many on a processor. `norm` fp16 [padded], `residual` fp32 [N] and `places` int32 [N] go with plans that
    want them; `overlap` as in `Kernel.launch`.
    """
    arguments = Gemv(
        pointer(weight.words),
        pointer(weight.scales),
        pointer(x),
        pointer(norm),
        pointer(weight.bias),
        pointer(out),
        pointer(residual),
        pointer(permutation),
        weight.out_features,
        weight.tiles,
        weight.chunks,
        weight.groups,
        weight.unit_to_group,
        weight.in_features,
        eps,
    )
    grid = min(-(-weight.tiles // plan.teams), blocks * gpu.processors)
    gpu.run(plan.name, (grid,), plan.threads, arguments, plan.shared_bytes(weight.chunks), overlap)
