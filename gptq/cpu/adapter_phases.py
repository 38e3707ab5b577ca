"""The compiled phases of LoRA adapters: what is computed before and in a product of a forward (forward.py)."""

from .cpu_kernels import shares
from .forward_addresses import scores_of, source_of, weight_rows
from .forward_arguments import (
    ADAPTER_A,
    ADAPTER_B,
    ADAPTER_COLUMNS,
    ADAPTER_INPUTS,
    ADAPTER_KIND,
    ADAPTER_RANK,
    MOST_WEIGHTS,
)
from .numba_compiler import compiled_part
from .numba_intrinsics import integers
from .products import dense_row


@compiled_part
def adapter_of(f, r, row):
    """What the adapter of row r adds to the weight in `row` of the table of weights (ADAPTER_COLUMNS); rank 0: nothing."""
    address = integers(f.row_adapters, f.rows)[r]
    return integers((address if address else f.no_adapter) + (8 * row * ADAPTER_COLUMNS if address else 0), ADAPTER_COLUMNS)


@compiled_part
def lower_rows(tid, threads, counters, phase, f, layer, product):
    """A x of each row's adapter, for every weight of a product. Returns the next phase."""
    source, weights = source_of(f, 0, product), weight_rows(f, layer, product)
    blocks = f.lowered_width // 16
    items = f.rows * weights.size * blocks
    for at in shares(counters, phase, items):
        block, one, r = at % blocks, at // blocks % weights.size, at // blocks // weights.size
        if weights[one] >= 0:
            adapter = adapter_of(f, r, weights[one])
            if 16 * block < adapter[ADAPTER_RANK]:
                out = f.lowered + 4 * ((r * MOST_WEIGHTS + one) * f.lowered_width + 16 * block)
                dense_row(adapter[ADAPTER_KIND], adapter[ADAPTER_A], block, adapter[ADAPTER_INPUTS], source[r].ctypes.data, out)
    return phase + 1


@compiled_part
def raise_rows(tid, first, last, f, row, one, target, column):
    """Add B (A x) to tiles first … last of a weight's outputs, which begin at the `column` of target."""
    scratch = scores_of(f, tid)[0]
    for r in range(f.rows):
        adapter = adapter_of(f, r, row)
        if adapter[ADAPTER_RANK]:
            lowered = f.lowered + 4 * (r * MOST_WEIGHTS + one) * f.lowered_width
            for t in range(first, last):
                dense_row(adapter[ADAPTER_KIND], adapter[ADAPTER_B], t, adapter[ADAPTER_RANK], lowered, scratch.ctypes.data)
                for i in range(16):
                    target[r, column + 16 * t + i] += scratch[i]
