"""Parts of a layer that a thread computes by itself: rounding, products, rotary positions, attention, the gate."""

import numpy as np

from .cpu_kernels import BIAS, CHUNK_ROWS, CHUNKS, ORDER, SHARED, SLOT, TILES, exp, half_products, norm_row, product, round_row
from .numba_compiler import compiled
from .numba_intrinsics import store_half


@compiled
def round_rows(me, first, last, x, weights, row, orders, x8, x16, x_scales, x_sums):
    """Round rows first to last of x [rows, K] for the weights in `row`; a dense weight needs none."""
    table = weights[row]
    if table[CHUNKS] == 0 or table[SHARED]:
        return
    slot = table[SLOT]
    at, width = table[ORDER], table[CHUNKS] * table[CHUNK_ROWS]
    order = orders[at : at + width] if at >= 0 else orders[:0]
    for r in range(first, last):
        round_row(
            x[r], r, order, table[CHUNKS], table[CHUNK_ROWS], x8[me, slot], x16[me, slot], x_scales[me, slot], x_sums[me, slot]
        )


@compiled
def multiply(me, first, last, rows, x, weights, row, x8, x_scales, x_sums, y, column, biases):
    """The tiles first … last, as far as it has them, of the product in `row`; y's columns begin at `column`."""
    table = weights[row]
    first, last = max(first, 0), min(last, table[TILES])
    if first < last:
        slot = table[SLOT]
        bias = biases.ctypes.data + 4 * table[BIAS] if table[BIAS] >= 0 else 0
        product(
            table, first, last, rows, x.ctypes.data, x.strides[0], x8[me, slot].ctypes.data, x_scales[me, slot].ctypes.data,
            x_sums[me, slot].ctypes.data, y.ctypes.data + 4 * column, y.strides[0], bias,
        )  # fmt: skip


@compiled
def share_of(at, items, count):
    """(first, last) of the `at`-th of `items` even shares of `count`."""
    return count * at // items, count * (at + 1) // items


@compiled
def turn(x, start, head_dim, half, cos, sin, norm, eps):
    """Norm (if there is one) and rotary position of one head, x [start : start + D], in place."""
    if norm.size:
        norm_row(x[start : start + head_dim], norm, eps, x[start : start + head_dim])
    for i in range(half):
        a, b = x[start + i], x[start + half + i]
        x[start + i] = a * cos[i] - b * sin[i]
        x[start + half + i] = b * cos[i] + a * sin[i]


@compiled
def remember(row, k_at, v_at, position, head_dim, half, cos, sin, norm, eps, keys, values, scratch):
    """Put one head's key and value into the memory. Two threads may do the same at once: they write the same."""
    for i in range(head_dim):
        scratch[i] = row[k_at + i]
    turn(scratch, 0, head_dim, half, cos, sin, norm, eps)
    place = keys[position // 16].ctypes.data + 2 * (position % 16)
    for i in range(head_dim):
        store_half(place + 32 * i, scratch[i])
    place = values.ctypes.data + 32 * position
    for i in range(head_dim):
        store_half(place + 32 * values.shape[1] * (i // 16) + 2 * (i % 16), row[v_at + i])


@compiled
def attend(query, q_stride, out, o_stride, count, position, later, window, keys, values, capacity, head_dim, scores):
    """`count` query rows of one head; row r stands at position + r * later. keys and values are that head's addresses."""
    last = position + (count - 1) * later
    begin = max(0, position - window + 1) // 16 if window > 0 else 0
    tiles_ = last // 16 + 1 - begin
    width = 16 * tiles_
    mine, s_stride = scores.ctypes.data, scores.strides[0]
    half_products(keys + begin * head_dim * 32, query, q_stride, head_dim, mine, s_stride, count, tiles_, head_dim * 32)
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    for r in range(count):
        row = scores[r]
        high = position + r * later + 1 - 16 * begin
        low = max(0, high - window) if window > 0 else 0
        largest = row[low]
        for i in range(low, high):
            largest = max(largest, row[i])
        total = np.float32(0.0)
        for i in range(low, high):
            value = exp((row[i] - largest) * scale)
            row[i] = value
            total += value
        for i in range(low, high):
            row[i] /= total
        row[:low] = np.float32(0.0)
        row[high:width] = np.float32(0.0)
    half_products(values + begin * 512, mine, s_stride, width, out, o_stride, count, head_dim // 16, capacity * 32)


@compiled
def gated(gate_up, up_column, out, inner):
    for i in range(inner):
        gate = gate_up[i]
        out[i] = gate / (np.float32(1.0) + exp(-gate)) * gate_up[up_column + i]
