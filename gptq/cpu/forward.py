"""The whole forward of a model as one compiled function, which all threads run together.

The work is divided into phases: `shares` gives each thread the next item of a phase that no other has, and ends
when all items of all threads are done. A step of one token normalises and rounds its row in every thread, which is
cheaper than one more phase; a chunk of a prompt divides its rows among the threads. `f` is a record with the fields
FORWARD of forward_arguments.py.
"""

import numpy as np

from .adapter_phases import lower_rows, raise_rows
from .cpu_kernels import CHUNKS, TILES, WEIGHT_COLUMNS, layer_norm_row, norm_row, shares
from .expert_phases import add_experts, compute_experts
from .forward_addresses import (
    capacity_of,
    column_of,
    keys_of,
    layer_row,
    position_of,
    scores_of,
    source_of,
    target_of,
    values_of,
    weight_rows,
)
from .forward_arguments import (
    ATTENDED_NORM,
    ATTENTION_NORM,
    CHUNK,
    DOWN_PRODUCT,
    GATE_UP_PRODUCT,
    INNER,
    INNER_NORM,
    LAYER_NORMS,
    MIXTURE,
    MLP_NORM,
    OUT_PRODUCT,
    PRODUCTS,
    QUERIES_PRODUCT,
    WINDOW,
)
from .latent_phases import meet_latent, norm_queries, read_values
from .numba_compiler import compiled, compiled_part
from .numba_intrinsics import float_rows, floats, integers
from .position_phases import QK_WIDTH, rotate_head, store_head, store_positions
from .row_ops import attend, cap_row, gate_row, multiply, round_rows, share_of

PHASES_PER_LAYER = 21  # at most, but for the experts'
# Each thread gets several items of a phase, so that one that the system has suspended delays the others little.
ROW_ITEMS, LINEAR_ITEMS, HEAD_ITEMS = 4, 8, 16
PRODUCT_ITEMS = (4, 4, 4, 6, 4)


@compiled
def forward(tid, threads, counters, arguments):
    """Compute the rows of the record `arguments` [1]; the logits of the last `head_rows` are left in its `logits`."""
    f = arguments[0]
    phase = 0
    for layer in range(f.layer_count):
        for at in range(PRODUCTS):  # numba would compile `multiply_layer` again for each constant
            product = at
            if f.parallel and at in (OUT_PRODUCT, GATE_UP_PRODUCT):  # out is added to x, which gate and up still read
                product = OUT_PRODUCT + GATE_UP_PRODUCT - at
            if product == OUT_PRODUCT:
                if f.latent.rank:
                    phase = meet_latent(tid, threads, counters, phase, f, layer)
                elif f.rows > 1 or f.qk_norm == QK_WIDTH:
                    phase = store_positions(tid, threads, counters, phase, f, layer)
                phase = attend_layer(tid, threads, counters, phase, f, layer)
                if f.latent.rank:
                    phase = read_values(tid, threads, counters, phase, f, layer)
            phase = multiply_layer(tid, threads, counters, phase, f, layer, product)
            if f.experts.count and layer_row(f, layer)[MIXTURE] >= 0:
                if product == GATE_UP_PRODUCT:
                    phase = compute_experts(tid, threads, counters, phase, f, layer)
                elif product == DOWN_PRODUCT:
                    phase = add_experts(tid, threads, counters, phase, f, layer)
            if f.norms_after and product in (OUT_PRODUCT, DOWN_PRODUCT):
                phase = add_normed(tid, threads, counters, phase, f, layer, product)
    multiply_head(tid, threads, counters, phase, f)


@compiled_part
def norm_residual(f, at, x, out):
    """Apply one of the norms of the residual's width to the row x; out may be x."""
    address = f.norms + 8 * at * f.norm_width
    weight = floats(address, f.norm_width)
    if f.layer_norm:
        layer_norm_row(x, weight, f.eps, out)
        bias = floats(address + 4 * f.norm_width, f.norm_width)
        for i in range(f.norm_width):
            out[i] += bias[i]
    else:
        norm_row(x, weight, f.eps, out)


@compiled_part
def prepare_rows(me, first, last, f, layer, product):
    """Compute the input of a product, rows first to last, and round it for the product's weights."""
    source = source_of(f, me, product)
    if product == DOWN_PRODUCT:
        gate_up = float_rows(f.gate_up, f.rows, f.gate_up_width)
        up_column, inner = column_of(f, layer, GATE_UP_PRODUCT, 1), layer_row(f, layer)[INNER]
        for r in range(first, last):
            gate_row(gate_up[r], up_column, source[r], inner, f)
    elif product == QUERIES_PRODUCT:
        norm_queries(first, last, f, layer, source)
    elif product != OUT_PRODUCT:
        x = float_rows(f.x, f.rows, f.hidden_width)
        norm = LAYER_NORMS * layer + (MLP_NORM if product == GATE_UP_PRODUCT else ATTENTION_NORM)
        for r in range(first, last):
            if f.norms_before:
                norm_residual(f, norm, x[r], source[r])
            else:
                for i in range(f.norm_width):
                    source[r, i] = x[r, i]
    for row in weight_rows(f, layer, product):
        if row >= 0:
            round_rows(me, first, last, source, f.tables, row, f.rounded)


@compiled_part
def multiply_layer(tid, threads, counters, phase, f, layer, product):
    """One of a layer's products, with what comes before it and (out, down) the addition to x. Returns the next phase.

    What a mixture of experts gives is added by `add_experts`.
    """
    rows = f.rows
    weights = weight_rows(f, layer, product)
    tiles = 0
    for row in weights:
        if row >= 0:
            tiles += integers(f.tables.weights + 8 * row * WEIGHT_COLUMNS, WEIGHT_COLUMNS)[TILES]
    if tiles == 0:  # queries that qkv gives; a mixture without a shared expert has no down of its own
        return phase
    mixture = layer_row(f, layer)[MIXTURE] >= 0
    alone = rows == 1 and not f.adapted and not (mixture and product == GATE_UP_PRODUCT)  # the experts read it too
    me = tid if alone else 0
    if not alone:
        items = min(rows, ROW_ITEMS * threads)
        for at in shares(counters, phase, items):
            first, last = share_of(at, items, rows)
            prepare_rows(me, first, last, f, layer, product)
        phase += 1
    if f.adapted:
        phase = lower_rows(tid, threads, counters, phase, f, layer, product)
    x, source, target = float_rows(f.x, rows, f.hidden_width), source_of(f, me, product), target_of(f, product)
    items = min(tiles, PRODUCT_ITEMS[product] * threads)
    ready = not alone
    for at in shares(counters, phase, items):
        if not ready:
            prepare_rows(me, 0, 1, f, layer, product)
            ready = True
        first, last = share_of(at, items, tiles)
        before = 0  # tiles of the weights that come first
        for one in range(weights.size):
            row = weights[one]
            if row >= 0:
                column = column_of(f, layer, product, one)
                count = multiply(me, first - before, last - before, rows, source, f.tables, row, f.rounded, target, column)
                if f.adapted:
                    raise_rows(tid, max(first - before, 0), min(last - before, count), f, row, one, target, column)
                before += count
        if not f.norms_after and (product == OUT_PRODUCT or (product == DOWN_PRODUCT and not mixture)):
            for r in range(rows):
                for i in range(16 * first, 16 * last):
                    x[r, i] += f.residual_scale * target[r, i]
    return phase + 1


@compiled_part
def add_normed(tid, threads, counters, phase, f, layer, product):
    """Norm what attention or the MLP gave, and add it to x. Returns the next phase."""
    x, target = float_rows(f.x, f.rows, f.hidden_width), target_of(f, product)
    norm = LAYER_NORMS * layer + (INNER_NORM if product == DOWN_PRODUCT else ATTENDED_NORM)
    items = min(f.rows, ROW_ITEMS * threads)
    for at in shares(counters, phase, items):
        first, last = share_of(at, items, f.rows)
        for r in range(first, last):
            norm_residual(f, norm, target[r], target[r])
            for i in range(f.norm_width):
                x[r, i] += f.residual_scale * target[r, i]
    return phase + 1


@compiled_part
def attend_layer(tid, threads, counters, phase, f, layer):
    """Attention. One product computes several heads of a row that share keys (few rows), or several rows of a head (a prompt)."""
    rows, head_dim, value_dim = f.rows, f.head_dim, f.value_dim
    group = f.heads // f.kv_heads
    window, chunk = layer_row(f, layer)[WINDOW], layer_row(f, layer)[CHUNK]
    here = f.rows == 1 and f.qk_norm != QK_WIDTH and f.latent.rank == 0  # positions are not stored yet
    blocks = (group + 3) // 4  # of up to four heads that share keys
    fours = (rows + 3) // 4
    items = rows * f.kv_heads * blocks if f.mixed else f.heads * fours
    for at in shares(counters, phase, items):
        if f.mixed:
            r, block, later = at % rows, at // rows % blocks, 0
            head = at // rows // blocks * group + 4 * block
            count = min(4, group - 4 * block)
            stride, out_stride = 4 * head_dim, 4 * value_dim
            bias_stride, sink_stride = 4 * f.bias_positions, 4
            if here:
                for one in range(count):
                    rotate_head(f, layer, 0, head + one, position_of(f, 0), floats(f.qkv, f.qkv_width), (head + one) * head_dim)
                store_head(tid, f, layer, 0, head // group)
        else:
            # All rows of a head before the next one, so that its keys stay in the cache; the long rows first.
            head, r = at // fours, (fours - 1 - at % fours) * 4
            count, later, stride, out_stride = min(4, rows - r), 1, 4 * f.queries_width, 4 * f.gathered_width
            bias_stride = sink_stride = 0
        query = f.queries + 4 * (r * f.queries_width + head * head_dim)
        bias = f.bias + 4 * head * f.bias_positions if f.bias_positions else 0
        sink = f.sinks + 4 * (layer * f.heads + head) if f.has_sinks else 0
        out = f.gathered + 4 * (r * f.gathered_width + head * value_dim)
        attend(
            query, stride, out, out_stride, count, position_of(f, r), later, window, chunk, keys_of(f, r, layer, head // group),
            values_of(f, r, layer, head // group), capacity_of(f, r), head_dim, value_dim, scores_of(f, tid), f.score_scale,
            f.score_cap, bias, bias_stride, sink, sink_stride,
        )  # fmt: skip
    return phase + 1


@compiled_part
def multiply_head(tid, threads, counters, phase, f):
    """Logits of the last `head_rows` rows. Every thread normalises and rounds them for itself."""
    rows = f.head_rows
    own = float_rows(f.head_hidden + 4 * tid * f.head_limit * f.hidden_width, rows, f.hidden_width)
    logits = float_rows(f.logits, rows, f.logits_width)
    ready = False
    tiles = integers(f.tables.weights + 8 * f.head_row * WEIGHT_COLUMNS, WEIGHT_COLUMNS)[TILES]
    items = min(tiles, HEAD_ITEMS * threads)
    for at in shares(counters, phase, items):
        if not ready:
            x = float_rows(f.x, f.rows, f.hidden_width)
            for r in range(rows):
                norm_residual(f, LAYER_NORMS * f.layer_count, x[f.rows - rows + r], own[r])
            round_rows(tid, 0, rows, own, f.tables, f.head_row, f.head_rounded)
            ready = True
        first, last = share_of(at, items, tiles)
        multiply(tid, first, last, rows, own, f.tables, f.head_row, f.head_rounded, logits, 0)
        if f.logits_cap > 0:
            for r in range(rows):
                cap_row(logits[r], 16 * first, 16 * last, np.float32(1.0), f.logits_cap)


@compiled
def linear(tid, threads, counters, arguments):
    """One product alone; `arguments` [1] is a record with the fields LINEAR."""
    f = arguments[0]
    weight = integers(f.tables.weights, WEIGHT_COLUMNS)
    x, y = float_rows(f.x, f.rows, f.x_width), float_rows(f.y, f.rows, f.y_width)
    if weight[CHUNKS]:
        items = min(f.rows, ROW_ITEMS * threads)
        for at in shares(counters, 0, items):
            first, last = share_of(at, items, f.rows)
            round_rows(0, first, last, x, f.tables, 0, f.rounded)
    items = min(weight[TILES], LINEAR_ITEMS * threads)
    for at in shares(counters, 1, items):
        first, last = share_of(at, items, weight[TILES])
        multiply(0, first, last, f.rows, x, f.tables, 0, f.rounded, y, 0)
