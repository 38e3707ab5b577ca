"""Products of 2 to 64 rows: which kernel of few.cu computes them, and how it is launched."""

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from .cuda_kernels import Gpu, Shape, SmallBatch, SmallBatchVariant, pointer
from .cuda_weights import Weight

MOST_ROWS = 96  # beyond, making the weight dense and cuBLAS are faster (NOTES.md)
COLUMNS = (1, 2, 4, 8)  # of 8 rows each
# (tiles, split, stages) by columns, the best on an H200 first; the first that fits into a card's shared memory is taken.
# Weights with many outputs have work for every processor at four tiles a block, the others at two.
_WIDE = {
    1: ((4, 8, 3), (2, 4, 4), (2, 4, 2)),
    2: ((8, 4, 3), (4, 4, 3), (2, 4, 3), (2, 4, 2)),
    4: ((4, 4, 3), (2, 4, 3), (1, 4, 2), (1, 2, 2)),
    8: ((2, 4, 3), (1, 4, 2), (1, 2, 2)),
}
_NARROW = {
    1: ((4, 8, 4), (2, 4, 4), (2, 4, 2)),
    2: ((2, 8, 4), (2, 4, 3), (2, 4, 2)),
    4: ((2, 8, 3), (2, 4, 3), (1, 4, 2), (1, 2, 2)),
    8: ((2, 4, 3), (1, 4, 2), (1, 2, 2)),
}
_SPREADS = {"PLAIN": {**_WIDE, 2: ((4, 8, 3), *_WIDE[2]), 4: ((4, 8, 3), *_WIDE[4])}, "SILU": _WIDE, "RESIDUAL": _NARROW}


@lru_cache(maxsize=256)
def variants(shape: Shape, epilogue: str, limit_bytes: int) -> dict[int, SmallBatchVariant]:
    """By columns, those that fit into `limit_bytes` of shared memory for a block."""
    found = {}
    for columns, spreads in _SPREADS[epilogue].items():
        for tiles, split, stages in spreads:
            plan = SmallBatchVariant(shape, epilogue, columns, tiles, split, stages)
            if plan.shared_bytes <= limit_bytes:
                found[columns] = plan
                break
    return found


def every_variant(gpu: Gpu, shapes: Iterable[tuple[Shape, str]]) -> list[SmallBatchVariant]:
    """What a model needs; `shapes` are (shape, epilogue)."""
    return [plan for shape, epilogue in set(shapes) for plan in variants(shape, epilogue, gpu.shared_limit_bytes).values()]


def multiply(gpu: Gpu, weight: Weight, epilogue: str, x: Tensor, out: Tensor) -> None:
    """x fp16 [T, padded] in engine order, contiguous -> out, contiguous: fp16 [T, N] (PLAIN), fp16 [T, N / 2] (SILU), or added
    to fp32 [T, N] (RESIDUAL). Its variants must be compiled (`every_variant`)."""
    plans = variants(weight.shape, epilogue, gpu.shared_limit_bytes)
    most, rows = 8 * max(plans), x.shape[0]
    for first in range(0, rows, most):
        count = min(most, rows - first)
        plan = plans[next(each for each in plans if each * 8 >= count)]
        launch(gpu, weight, plan, x[first:] if first else x, out[first:] if first else out, count)


def launch(gpu: Gpu, weight: Weight, plan: SmallBatchVariant, x: Tensor, out: Tensor, rows: int) -> None:
    added = plan.epilogue == "RESIDUAL"
    arguments = SmallBatch(
        pointer(weight.words),
        pointer(weight.scales),
        pointer(x),
        pointer(weight.bias),
        None if added else pointer(out),
        pointer(out) if added else None,
        weight.out_features,
        weight.tiles,
        weight.chunks,
        weight.groups,
        weight.unit_to_group,
        rows,
    )
    name, shared_bytes, at_once = _facts(plan, gpu.shared_bytes)
    blocks = min(-(-weight.tiles // plan.tiles), at_once * gpu.processors)
    gpu.run(name, (blocks,), plan.threads, arguments, shared_bytes, overlap=True)


@lru_cache(maxsize=256)
def _facts(plan: SmallBatchVariant, processor_bytes: int) -> tuple[str, int, int]:
    """(name, shared memory of a block, blocks on a processor at once)."""
    return plan.name, plan.shared_bytes, max(1, min(processor_bytes // (plan.shared_bytes + 1024), 32 // plan.split))
