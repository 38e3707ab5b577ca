"""The whole forward of a Llama-family model as one compiled function, run by every thread at once.

A step of one token rounds and normalises in every thread for itself (that is cheaper than meeting); a chunk
of a prompt shares its rows out and meets. Keys lie [layer][kv head][position/16][D][16], values
[layer][kv head][D/16][position][16], both halves, so that attention is products with dense tiles (tiles.py).
"""

from .cpu_kernels import CHUNKS, TILES, claim, finish, norm_row
from .numba_compiler import compiled
from .row_ops import attend, gated, multiply, remember, round_rows, share_of, turn

# Columns of the table of layers: rows of the table of weights (-1: in the one before), then numbers.
Q, K, V, OUT, GATE, UP, DOWN, WINDOW = range(8)
# Places in `sizes`.
HEADS, KV_HEADS, HEAD_DIM, HALF_ROTARY, K_COLUMN, V_COLUMN, UP_COLUMN, INNER, HEAD_ROW, HAS_QK_NORM = range(10)


@compiled
def forward(
    tid, threads, counters, rows, start, sizes, eps, weights, layers, orders, biases, norms, qk_norms, cos, sin,
    keys, values, x, h, x8, x16, x_scales, x_sums, qkv, mixed, gate_up, act, scores, logits,
    head_x8, head_x16, head_scales, head_sums,
):  # fmt: skip
    """Put x [rows, H] (embeddings) at positions start … through the model; the last row's logits into logits [1, V].

    h, x8 … x_sums, act exist once for every thread if rows is one, else once; head_… for every thread.
    """
    heads, kv_heads, head_dim, half = sizes[HEADS], sizes[KV_HEADS], sizes[HEAD_DIM], sizes[HALF_ROTARY]
    k_column, v_column, up_column, inner = sizes[K_COLUMN], sizes[V_COLUMN], sizes[UP_COLUMN], sizes[INNER]
    group = heads // kv_heads
    capacity = values.shape[3]
    alone = rows == 1
    me = tid if alone else 0
    hidden, inside = h[me], act[me]
    row_items = min(rows, 4 * threads)
    scratch = scores[tid, 0]
    no_norm = qk_norms[0, :0]
    phase = 0
    for l in range(layers.shape[0]):  # noqa: E741
        layer = layers[l]
        q_norm, k_norm = (qk_norms[2 * l], qk_norms[2 * l + 1]) if sizes[HAS_QK_NORM] else (no_norm, no_norm)

        # --- attention: norm, q, k, v
        ready = not alone
        if not alone:
            mine = 0
            at = claim(counters, phase)
            while at < row_items:
                first, last = share_of(at, row_items, rows)
                for r in range(first, last):
                    norm_row(x[r], norms[2 * l], eps, hidden[r])
                for one in range(3):
                    if layer[Q + one] >= 0:
                        round_rows(me, first, last, hidden, weights, layer[Q + one], orders, x8, x16, x_scales, x_sums)
                mine += 1
                at = claim(counters, phase)
            finish(counters, phase, mine, row_items)
            phase += 1
        q_tiles = weights[layer[Q], TILES]
        k_tiles = weights[layer[K], TILES] if layer[K] >= 0 else 0
        v_tiles = weights[layer[V], TILES] if layer[V] >= 0 else 0
        tiles_ = q_tiles + k_tiles + v_tiles
        items, mine = min(tiles_, 4 * threads), 0
        at = claim(counters, phase)
        while at < items:
            if not ready:
                norm_row(x[0], norms[2 * l], eps, hidden[0])
                for one in range(3):
                    if layer[Q + one] >= 0:
                        round_rows(me, 0, 1, hidden, weights, layer[Q + one], orders, x8, x16, x_scales, x_sums)
                ready = True
            first, last = share_of(at, items, tiles_)
            multiply(me, first, last, rows, hidden, weights, layer[Q], x8, x_scales, x_sums, qkv, 0, biases)
            if k_tiles:
                first, last = first - q_tiles, last - q_tiles
                multiply(me, first, last, rows, hidden, weights, layer[K], x8, x_scales, x_sums, qkv, k_column, biases)
                first, last = first - k_tiles, last - k_tiles
                multiply(me, first, last, rows, hidden, weights, layer[V], x8, x_scales, x_sums, qkv, v_column, biases)
            mine += 1
            at = claim(counters, phase)
        finish(counters, phase, mine, items)
        phase += 1

        # --- positions, memory
        if not alone:
            mine = 0
            at = claim(counters, phase)
            while at < row_items:
                first, last = share_of(at, row_items, rows)
                for r in range(first, last):
                    position = start + r
                    for head in range(heads):
                        turn(qkv[r], head * head_dim, head_dim, half, cos[position], sin[position], q_norm, eps)
                    for head in range(kv_heads):
                        remember(
                            qkv[r], k_column + head * head_dim, v_column + head * head_dim, position, head_dim, half,
                            cos[position], sin[position], k_norm, eps, keys[l, head], values[l, head], scratch,
                        )  # fmt: skip
                mine += 1
                at = claim(counters, phase)
            finish(counters, phase, mine, row_items)
            phase += 1

        # --- attention proper: heads with the same keys, or rows of one head, as the rows of a product
        size = 4 if not alone or group % 4 == 0 else group if group < 4 else 1
        items = heads // size if alone else heads * ((rows + 3) // 4)
        mine = 0
        at = claim(counters, phase)
        while at < items:
            if alone:
                head, r, taken, later = at * size, 0, size, 0
                stride = out_stride = 4 * head_dim
                for one in range(size):
                    turn(qkv[0], (head + one) * head_dim, head_dim, half, cos[start], sin[start], q_norm, eps)
                own = head // group
                remember(
                    qkv[0], k_column + own * head_dim, v_column + own * head_dim, start, head_dim, half,
                    cos[start], sin[start], k_norm, eps, keys[l, own], values[l, own], scratch,
                )  # fmt: skip
            else:
                head, r = at % heads, (items - 1 - at) // heads * 4  # the long rows first
                taken, later, stride, out_stride = min(4, rows - r), 1, qkv.strides[0], mixed.strides[0]
            attend(
                qkv[r].ctypes.data + 4 * head * head_dim, stride, mixed[r].ctypes.data + 4 * head * head_dim, out_stride, taken,
                start + r, later, layer[WINDOW], keys[l, head // group].ctypes.data, values[l, head // group].ctypes.data,
                capacity, head_dim, scores[tid],
            )  # fmt: skip
            mine += 1
            at = claim(counters, phase)
        finish(counters, phase, mine, items)
        phase += 1

        # --- o, added to x
        ready = not alone
        if not alone:
            mine = 0
            at = claim(counters, phase)
            while at < row_items:
                first, last = share_of(at, row_items, rows)
                round_rows(me, first, last, mixed, weights, layer[OUT], orders, x8, x16, x_scales, x_sums)
                mine += 1
                at = claim(counters, phase)
            finish(counters, phase, mine, row_items)
            phase += 1
        tiles_ = weights[layer[OUT], TILES]
        items, mine = min(tiles_, 4 * threads), 0
        at = claim(counters, phase)
        while at < items:
            if not ready:
                round_rows(me, 0, 1, mixed, weights, layer[OUT], orders, x8, x16, x_scales, x_sums)
                ready = True
            first, last = share_of(at, items, tiles_)
            multiply(me, first, last, rows, mixed, weights, layer[OUT], x8, x_scales, x_sums, gate_up, 0, biases)
            for r in range(rows):
                for i in range(16 * first, 16 * last):
                    x[r, i] += gate_up[r, i]
            mine += 1
            at = claim(counters, phase)
        finish(counters, phase, mine, items)
        phase += 1

        # --- gate and up
        ready = not alone
        if not alone:
            mine = 0
            at = claim(counters, phase)
            while at < row_items:
                first, last = share_of(at, row_items, rows)
                for r in range(first, last):
                    norm_row(x[r], norms[2 * l + 1], eps, hidden[r])
                for one in range(2):
                    if layer[GATE + one] >= 0:
                        round_rows(me, first, last, hidden, weights, layer[GATE + one], orders, x8, x16, x_scales, x_sums)
                mine += 1
                at = claim(counters, phase)
            finish(counters, phase, mine, row_items)
            phase += 1
        gate_tiles = weights[layer[GATE], TILES]
        tiles_ = gate_tiles + (weights[layer[UP], TILES] if layer[UP] >= 0 else 0)
        items, mine = min(tiles_, 6 * threads), 0
        at = claim(counters, phase)
        while at < items:
            if not ready:
                norm_row(x[0], norms[2 * l + 1], eps, hidden[0])
                for one in range(2):
                    if layer[GATE + one] >= 0:
                        round_rows(me, 0, 1, hidden, weights, layer[GATE + one], orders, x8, x16, x_scales, x_sums)
                ready = True
            first, last = share_of(at, items, tiles_)
            multiply(me, first, last, rows, hidden, weights, layer[GATE], x8, x_scales, x_sums, gate_up, 0, biases)
            if layer[UP] >= 0:
                first, last = first - gate_tiles, last - gate_tiles
                multiply(me, first, last, rows, hidden, weights, layer[UP], x8, x_scales, x_sums, gate_up, up_column, biases)
            mine += 1
            at = claim(counters, phase)
        finish(counters, phase, mine, items)
        phase += 1

        # --- SiLU(gate) * up, down, added to x
        ready = not alone
        if not alone:
            mine = 0
            at = claim(counters, phase)
            while at < row_items:
                first, last = share_of(at, row_items, rows)
                for r in range(first, last):
                    gated(gate_up[r], up_column, inside[r], inner)
                round_rows(me, first, last, inside, weights, layer[DOWN], orders, x8, x16, x_scales, x_sums)
                mine += 1
                at = claim(counters, phase)
            finish(counters, phase, mine, row_items)
            phase += 1
        tiles_ = weights[layer[DOWN], TILES]
        items, mine = min(tiles_, 4 * threads), 0
        at = claim(counters, phase)
        while at < items:
            if not ready:
                gated(gate_up[0], up_column, inside[0], inner)
                round_rows(me, 0, 1, inside, weights, layer[DOWN], orders, x8, x16, x_scales, x_sums)
                ready = True
            first, last = share_of(at, items, tiles_)
            multiply(me, first, last, rows, inside, weights, layer[DOWN], x8, x_scales, x_sums, qkv, 0, biases)
            for r in range(rows):
                for i in range(16 * first, 16 * last):
                    x[r, i] += qkv[r, i]
            mine += 1
            at = claim(counters, phase)
        finish(counters, phase, mine, items)
        phase += 1

    # --- the last row's logits; every thread that helps rounds its norm for itself
    own = logits[1 + tid : 2 + tid]
    ready = False
    tiles_ = weights[sizes[HEAD_ROW], TILES]
    items, mine = min(tiles_, 16 * threads), 0
    at = claim(counters, phase)
    while at < items:
        if not ready:
            norm_row(x[rows - 1], norms[2 * layers.shape[0]], eps, own[0])
            round_rows(tid, 0, 1, own, weights, sizes[HEAD_ROW], orders, head_x8, head_x16, head_scales, head_sums)
            ready = True
        first, last = share_of(at, items, tiles_)
        multiply(tid, first, last, 1, own, weights, sizes[HEAD_ROW], head_x8, head_scales, head_sums, logits, 0, biases)
        mine += 1
        at = claim(counters, phase)
    finish(counters, phase, mine, items)


@compiled
def linear(tid, threads, counters, rows, weights, order, bias, x, x8, x16, x_scales, x_sums, y):
    """y [rows, N] = x [rows, K] W + bias for one row of a table of weights, alone."""
    table = weights[0]
    row_items, mine = min(rows, 4 * threads), 0
    if table[CHUNKS]:
        at = claim(counters, 0)
        while at < row_items:
            first, last = share_of(at, row_items, rows)
            round_rows(0, first, last, x, weights, 0, order, x8, x16, x_scales, x_sums)
            mine += 1
            at = claim(counters, 0)
        finish(counters, 0, mine, row_items)
    items, mine = min(table[TILES], 8 * threads), 0
    at = claim(counters, 1)
    while at < items:
        first, last = share_of(at, items, table[TILES])
        multiply(0, first, last, rows, x, weights, 0, x8, x_scales, x_sums, y, 0, bias)
        mine += 1
        at = claim(counters, 1)
    finish(counters, 1, mine, items)
