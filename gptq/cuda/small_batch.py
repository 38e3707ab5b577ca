"""Products of 2 to 96 rows: which kernel of small_batch.cu computes them, and how it is launched."""

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from ..suitability import Unsuited
from .cuda_weights import Weight
from .gpu_kernels import Gpu
from .kernel_arguments import SMALL_BATCH
from .kernel_source import Packing, SmallBatchVariant

MOST_ROWS = 96  # beyond, making the weight dense and cuBLAS are faster (NOTES.md)
COLUMNS = (1, 2, 4, 8)  # of 8 rows each
# (tiles, split, stages) by columns, the best on an H200 first. The first that fits into a GPU's shared memory is taken.
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
def variants(packing: Packing, epilogue: str, limit_bytes: int) -> dict[int, SmallBatchVariant]:
    """By columns, those that fit into `limit_bytes` of shared memory of a block. Raises Unsuited if none does."""
    found = {}
    for columns, spreads in _SPREADS[epilogue].items():
        for tiles, split, stages in spreads:
            plan = SmallBatchVariant(packing, epilogue, columns, tiles, split, stages)
            if plan.shared_bytes <= limit_bytes:
                found[columns] = plan
                break
    if not found:
        raise Unsuited(f"a GPU with {limit_bytes} bytes of shared memory for a block")
    return found


def every_variant(gpu: Gpu, products: Iterable[tuple[Packing, str]]) -> list[SmallBatchVariant]:
    """What a model needs; `products` are (packing, epilogue)."""
    return [plan for each in set(products) for plan in variants(*each, gpu.shared_limit_bytes).values()]


def multiply(gpu: Gpu, weight: Weight, epilogue: str, x: Tensor, out: Tensor) -> None:
    """x fp16 [T, padded] in fragment order, contiguous -> out, contiguous: fp16 [T, N] (PLAIN), fp16 [T, N / 2] (SILU), or
    added to fp32 [T, N] (RESIDUAL). Its variants must be compiled (`every_variant`)."""
    plans = variants(weight.packing, epilogue, gpu.shared_limit_bytes)
    most, rows = 8 * max(plans), x.shape[0]
    if x.shape[1] != weight.padded:
        raise ValueError(f"The input has rows of {x.shape[1]} numbers; the weight takes {weight.padded}.")
    for first in range(0, rows, most):
        count = min(most, rows - first)
        plan = plans[next(each for each in plans if each * 8 >= count)]
        launch(gpu, weight, plan, x=x[first:] if first else x, out=out[first:] if first else out, rows=count)


def launch(gpu: Gpu, weight: Weight, plan: SmallBatchVariant, *, x: Tensor, out: Tensor, rows: int) -> None:
    """The first `rows` rows of x and out, at most `plan.columns` * 8."""
    name, threads, shared_bytes, residual, at_once = _launch_facts(plan, gpu.shared_bytes)
    arguments = SMALL_BATCH.pack(
        weights=weight.words,
        scales=weight.scales,
        x=x,
        bias=weight.bias,
        out=None if residual else out,
        residual=out if residual else None,
        n=weight.out_features,
        tiles=weight.tiles,
        chunks=weight.chunks,
        groups=weight.groups,
        unit_to_group=weight.unit_to_group,
        rows=rows,
    )
    blocks = min(-(-weight.tiles // plan.tiles), at_once * gpu.processors)
    gpu.run(name, (blocks,), threads, arguments, shared_bytes, overlap=True)


@lru_cache(maxsize=256)
def _launch_facts(plan: SmallBatchVariant, processor_bytes: int) -> tuple[str, int, int, bool, int]:
    """(name, threads, shared memory of a block, whether it adds to a residual, blocks on a processor at once)."""
    at_once = max(1, min(processor_bytes // (plan.shared_bytes + 1024), 32 // plan.split))
    return plan.name, plan.threads, plan.shared_bytes, plan.epilogue == "RESIDUAL", at_once
