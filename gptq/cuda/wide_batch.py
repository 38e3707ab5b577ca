"""Products of 17 to 256 rows: which kernel of wide_batch.cu computes them, and how it is launched."""

from functools import lru_cache

from torch import Tensor

from ..suitability import Unsuited
from .cuda_weights import Weight
from .gpu_kernels import SCRATCH_COUNTERS, Gpu, claimed_bytes
from .kernel_arguments import WIDE_BATCH
from .kernel_source import Packing, WideBatchVariant

COLUMNS = (4, 8, 12, 16)  # of 8 rows each
TALL = 0  # stands for columns of the variant that takes more than 128 rows, in items one above the other
_LEAST_STEPS = 2  # of a block: with fewer it costs more to add its sums than to make them
_MOST_ROWS, _MOST_ROWS_OF_WARPGROUPS = 256, 768  # beyond, dense weights and cuBLAS are faster (NOTES.md)
_Spreads = dict[int, tuple[tuple[int, int, int, int, int], ...]]
# (tiles, warps, split, stages, blocks) by columns, the best on an H200 first: the first that fits into shared memory is taken
_PLAIN: _Spreads = {
    4: ((4, 4, 1, 4, 2), (2, 8, 1, 4, 1), (2, 8, 1, 3, 1), (2, 4, 1, 2, 1)),
    8: ((2, 4, 1, 4, 2), (2, 8, 1, 4, 1), (2, 8, 1, 3, 1), (2, 4, 1, 2, 1)),
    12: ((2, 4, 1, 4, 2), (2, 8, 1, 4, 1), (2, 8, 1, 3, 1), (2, 4, 1, 3, 1), (1, 4, 1, 2, 1)),
    16: ((2, 8, 1, 4, 1), (2, 8, 1, 3, 1), (2, 4, 1, 3, 1), (1, 4, 1, 2, 1)),
}
_GROUPS: dict[str, _Spreads] = {  # of warpgroups, where there are some
    "PLAIN": {4: ((2, 4, 1, 8, 2),), 8: ((1, 4, 1, 6, 3),), 12: ((1, 4, 1, 7, 2),), 16: ((1, 4, 1, 5, 2), (1, 4, 1, 4, 1))},
    "SILU": {4: ((4, 4, 1, 6, 2),), 8: ((2, 4, 1, 8, 2),), 12: ((2, 8, 1, 6, 1),), 16: ((2, 8, 1, 6, 1), (2, 8, 1, 4, 1))},
    "RESIDUAL": {4: ((2, 4, 1, 8, 2),), 8: ((2, 4, 1, 6, 2),), 12: ((1, 12, 1, 8, 1),), 16: ((1, 8, 1, 8, 1), (1, 8, 1, 4, 1))},
}
_TALL_GROUPS = ((2, 8, 1, 8, 1), (2, 8, 1, 6, 1), (2, 8, 1, 4, 1))


@lru_cache(maxsize=256)
def variants(packing: Packing, epilogue: str, limit_bytes: int, warpgroups: bool) -> dict[int, WideBatchVariant]:
    """By columns, those that fit into `limit_bytes` of shared memory of a block. Raises Unsuited if one does not."""
    found = {}
    for columns in (*COLUMNS, TALL):
        most = columns or COLUMNS[-1]
        plans = [WideBatchVariant(packing, epilogue, most, *each) for each in _PLAIN[most]]
        if warpgroups:
            grouped = _GROUPS[epilogue][columns] if columns else _TALL_GROUPS
            plans = [WideBatchVariant(packing, epilogue, most, *each, warpgroup=True) for each in grouped] + plans
        room = limit_bytes + 1024  # of a processor, which keeps 1 KB for each block
        fitting = next((each for each in plans if (each.shared_bytes + 1024) * each.blocks <= room), None)
        if fitting is None:
            raise Unsuited(f"a GPU with {limit_bytes} bytes of shared memory for a block")
        found[columns] = fitting
    return found


def most_rows(gpu: Gpu) -> int:
    """Rows that are multiplied with the packed weight faster than with a dense one, which has to be made first."""
    return _MOST_ROWS_OF_WARPGROUPS if gpu.warpgroups else _MOST_ROWS


def reserve(gpu: Gpu, plan: WideBatchVariant) -> None:
    """Memory for the sums that the blocks of a launch leave for each other. A graph must not make it."""
    gpu.scratch(2 * plan.blocks * gpu.processors * plan.partial_bytes)


def multiply(gpu: Gpu, weight: Weight, epilogue: str, x: Tensor, out: Tensor) -> None:
    """As small_batch.multiply, of any number of rows."""
    rows = x.shape[0]
    plans = variants(weight.packing, epilogue, gpu.shared_limit_bytes, gpu.warpgroups)
    launch(gpu, weight, plans[next((each for each in COLUMNS if each * 8 >= rows), TALL)], x=x, out=out, rows=rows)


def launch(gpu: Gpu, weight: Weight, plan: WideBatchVariant, *, x: Tensor, out: Tensor, rows: int) -> None:
    """The first `rows` rows of x and out. One launch at a time uses a GPU's scratch."""
    blocks = _blocks(plan, weight.tiles, weight.chunks, -(-rows // (plan.columns * 8)), gpu.processors)
    scratch = gpu.scratch(2 * blocks * plan.partial_bytes)
    residual = plan.epilogue == "RESIDUAL"
    arguments = WIDE_BATCH.pack(
        weights=weight.words,
        scales=weight.scales,
        x=x,
        bias=weight.bias,
        out=None if residual else out,
        residual=out if residual else None,
        partial=scratch.sums,
        done=scratch.counters,
        n=weight.out_features,
        tiles=weight.tiles,
        chunks=weight.chunks,
        groups=weight.groups,
        unit_to_group=weight.unit_to_group,
        rows=rows,
    )
    shared_bytes = claimed_bytes(gpu, plan.shared_bytes, -(-blocks // gpu.processors))
    gpu.run(plan.name, (blocks,), plan.threads, arguments, shared_bytes, overlap=True)


@lru_cache(maxsize=1024)
def _blocks(plan: WideBatchVariant, tiles: int, chunks: int, high: int, processors: int) -> int:
    """`high`: items one above the other. Raises ValueError for more items than there are counters."""
    items = -(-tiles // plan.item_tiles) * high
    if items > SCRATCH_COUNTERS:
        raise ValueError(f"A product was to be computed in {items} items; {SCRATCH_COUNTERS} can be counted. Use fewer rows.")
    return max(1, min(plan.blocks * processors, items * -(-chunks // plan.split) // _LEAST_STEPS))
