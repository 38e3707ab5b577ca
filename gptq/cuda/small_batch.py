"""Products of 2 rows and more. Up to 32 are computed by small_batch.cu: which of its kernels, and how it is launched.

What is faster when the warps of a block share their input is left to wide_batch.py.
"""

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from ..suitability import Unsuited
from . import wide_batch
from .cuda_weights import Weight
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import SMALL_BATCH
from .kernel_source import Packing, SmallBatchVariant, WideBatchVariant

COLUMNS = (1, 2, 4)  # of 8 rows each
_LEAST_WIDE_ROWS = 17  # of a large weight; a small one has too few items for that before 33
_SMALL_WEIGHT = 50_000  # chunks of tiles; qkv and o of a 7B have 24,576 and 16,384, its MLP 57,344 and 114,688
# (tiles, split, stages) by columns, the best on an H200 first. The first that fits into a GPU's shared memory is taken.
# Items are about as many as an H200 has processors (132), or twice as many: of 7B's gate and up 256 of seven tiles, of its qkv
# 128 of three, of o and down 128 of two.
_Spreads = dict[int, tuple[tuple[int, int, int], ...]]
_WIDE: _Spreads = {
    1: ((4, 8, 3), (2, 4, 4), (2, 4, 2)),
    2: ((7, 4, 2), (4, 4, 3), (2, 4, 3), (2, 4, 2)),
    4: ((4, 8, 3), (4, 4, 3), (2, 4, 3), (1, 4, 2), (1, 2, 2)),
}
_NARROW: _Spreads = {
    1: ((4, 8, 4), (2, 4, 4), (2, 4, 2)),
    2: ((2, 16, 3), (2, 8, 4), (2, 4, 3), (2, 4, 2)),
    4: ((2, 8, 3), (2, 4, 3), (1, 4, 2), (1, 2, 2)),
}
_PLAIN: _Spreads = {**_WIDE, 2: ((3, 8, 4), (4, 8, 3), *_WIDE[2]), 4: ((3, 8, 3), *_WIDE[4])}
_SPREADS: dict[str, _Spreads] = {
    "PLAIN": _PLAIN,
    "BFLOAT": _PLAIN,
    "SILU": _WIDE,
    "RESIDUAL": _NARROW,
}


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


def every_variant(gpu: Gpu, products: Iterable[tuple[Packing, str]]) -> list[SmallBatchVariant | WideBatchVariant]:
    """What a model needs; `products` are (packing, epilogue)."""
    products, limit = set(products), gpu.shared_limit_bytes
    wide = [plan for each in products for plan in wide_batch.variants(*each, limit, gpu.warpgroups).values()]
    for plan in wide:
        wide_batch.reserve(gpu, plan)
    return [*wide, *(plan for each in products for plan in variants(*each, limit).values())]


def multiply(gpu: Gpu, weight: Weight, epilogue: str, x: Tensor, out: Tensor, powers: Tensor | None = None) -> None:
    """x fp16 [T, padded] in fragment order, contiguous -> out, contiguous: fp16 [T, N] (PLAIN), bf16 of up to 16 rows (BFLOAT),
    fp16 [T, N / 2] (SILU), or added to fp32 [T, N] (RESIDUAL). Its variants must be compiled (`every_variant`). Of x whose
    rows were divided by `powers` fp32 [T], BFLOAT gives the products of what they were, and PLAIN those of x without the bias."""
    if x.shape[1] != weight.padded:
        raise ValueError(f"The input has rows of {x.shape[1]} numbers; the weight takes {weight.padded}.")
    if powers is not None and (x.shape[0] >= _LEAST_WIDE_ROWS or epilogue not in ("PLAIN", "BFLOAT")):
        raise ValueError(
            f"{x.shape[0]} divided rows, {epilogue}: at most {_LEAST_WIDE_ROWS - 1} are multiplied, PLAIN or BFLOAT."
        )
    plans = variants(weight.packing, epilogue, gpu.shared_limit_bytes)
    most, rows = 8 * max(plans), x.shape[0]
    small = weight.tiles * weight.chunks <= _SMALL_WEIGHT
    if rows >= _LEAST_WIDE_ROWS and (not small or rows > most):
        wide_batch.multiply(gpu, weight, epilogue, x, out)
        return
    for first in range(0, rows, most):
        count = min(most, rows - first)
        plan = plans[next(each for each in plans if each * 8 >= count)]
        own = powers if powers is None else powers[first:]
        launch(gpu, weight, plan, x=x[first:] if first else x, out=out[first:] if first else out, rows=count, powers=own)


def launch(
    gpu: Gpu, weight: Weight, plan: SmallBatchVariant, *, x: Tensor, out: Tensor, rows: int, powers: Tensor | None = None
) -> None:  # fmt: skip
    """The first `rows` rows of x and out, at most `plan.columns` * 8."""
    name, threads, shared_bytes, residual, at_once = _launch_facts(plan, gpu.shared_bytes)
    arguments = SMALL_BATCH.pack(
        weights=weight.words,
        scales=weight.scales,
        x=x,
        bias=weight.bias if powers is None or plan.epilogue == "BFLOAT" else None,
        out=None if residual else out,
        residual=out if residual else None,
        powers=powers,
        n=weight.out_features,
        tiles=weight.tiles,
        chunks=weight.chunks,
        groups=weight.groups,
        unit_to_group=weight.unit_to_group,
        rows=rows,
    )
    blocks = min(-(-weight.tiles // plan.tiles), at_once * gpu.processors)
    gpu.run(name, (blocks,), threads, arguments, claimed_bytes(gpu, shared_bytes, -(-blocks // gpu.processors)), overlap=True)


@lru_cache(maxsize=256)
def _launch_facts(plan: SmallBatchVariant, processor_bytes: int) -> tuple[str, int, int, bool, int]:
    """(name, threads, shared memory of a block, whether it adds to a residual, blocks on a processor at once)."""
    at_once = max(1, min(processor_bytes // (plan.shared_bytes + 1024), 32 // plan.split))
    return plan.name, plan.threads, plan.shared_bytes, plan.epilogue == "RESIDUAL", at_once
