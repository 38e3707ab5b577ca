"""Compiled parts of a layer that one thread computes alone: rounding, products, rotary positions, attention, the gate."""

import numpy as np

from .cpu_kernels import (
    BIAS_START,
    CHUNK_ROWS,
    CHUNKS,
    ORDER_START,
    ROUNDED_BEFORE,
    ROUNDED_BUFFER,
    TILES,
    WEIGHT_COLUMNS,
    erf,
    exp,
    layer_norm_row,
    norm_row,
    round_row,
    tanh,
)
from .forward_arguments import ACTIVATION_NUMBERS
from .numba_compiler import compiled_part
from .numba_intrinsics import floats, integers, integers32, store_half
from .products import half_products, product
from .vector_ops import exp_scores16, largest16, quick16, rotate16, scale16, silu16, store_halves16

_BELOW_ALL = np.float32(-3.0e38)  # a score that a query does not see

SILU, GELU, GELU_TANH, GELU_QUICK, RELU, _RELU2 = ACTIVATION_NUMBERS.values()


@compiled_part
def round_rows(me, first, last, x, tables, row, rounded):
    """Round rows first to last of x [rows, K] for the weight in `row` of the table; a dense weight needs no rounding.

    `tables` and `rounded` are records (TABLES, ROUNDED of forward_arguments.py), `me` is the owner of what is rounded.
    """
    weight = integers(tables.weights + 8 * row * WEIGHT_COLUMNS, WEIGHT_COLUMNS)
    chunks, chunk_rows, start = weight[CHUNKS], weight[CHUNK_ROWS], weight[ORDER_START]
    if chunks == 0 or weight[ROUNDED_BEFORE]:
        return
    order = integers32(tables.orders + 4 * max(start, 0), chunks * chunk_rows if start >= 0 else 0)
    at = me * rounded.buffers + weight[ROUNDED_BUFFER]
    address = rounded.x + at * rounded.input_bytes
    scales = floats(rounded.scales + 4 * at * rounded.chunks, rounded.chunks)
    sums = integers32(rounded.sums + 4 * at * rounded.chunks, rounded.chunks)
    for r in range(first, last):
        round_row(x[r], r, order, chunks, chunk_rows, address, scales, sums)


@compiled_part
def rounded_at(weight, first, row, experts):
    """Addresses of the numbers, scales and sums of a pair that is rounded for an expert's weight (a row of the table).

    `first`: the expert's first pair; `row`: which of its pairs. They follow each other in the weight's own layout, and those
    of another expert begin where none of these can reach, whatever their layouts.
    """
    rounded = experts.rounded
    at, chunks = weight[ROUNDED_BUFFER], weight[CHUNKS]
    x = rounded.x + at * rounded.input_bytes + first * experts.row_bytes + 2 * row * chunks * weight[CHUNK_ROWS]
    start = 4 * (at * rounded.chunks + first * experts.row_chunks + row * chunks)
    return x, rounded.scales + start, rounded.sums + start


@compiled_part
def round_pair(x, factor, first, pair, tables, row, experts):
    """Round x [K] * factor for the packed weight in `row` of the table, and store it as that of `pair`; its expert's pairs begin
    at `first`."""
    weight = integers(tables.weights + 8 * row * WEIGHT_COLUMNS, WEIGHT_COLUMNS)
    if weight[ROUNDED_BEFORE]:
        return
    chunks, chunk_rows, start = weight[CHUNKS], weight[CHUNK_ROWS], weight[ORDER_START]
    order = integers32(tables.orders + 4 * max(start, 0), chunks * chunk_rows if start >= 0 else 0)
    address, scales, sums = rounded_at(weight, first, pair - first, experts)
    round_row(x, 0, order, chunks, chunk_rows, address, floats(scales, chunks), integers32(sums, chunks))
    if factor != np.float32(1.0):
        found = floats(scales, chunks)
        for c in range(chunks):
            found[c] *= factor


@compiled_part
def multiply(me, first, last, rows, x, tables, row, rounded, y, column):
    """Tiles first … last, as far as the weight in `row` has them, of its product; they begin at y's `column`.

    Returns how many tiles the weight has.
    """
    weight = integers(tables.weights + 8 * row * WEIGHT_COLUMNS, WEIGHT_COLUMNS)
    first, last = max(first, 0), min(last, weight[TILES])
    if first < last:
        at = me * rounded.buffers + weight[ROUNDED_BUFFER]
        bias = tables.biases + 4 * weight[BIAS_START] if weight[BIAS_START] >= 0 else 0
        product(
            weight, first, last, rows, x.ctypes.data, x.strides[0], rounded.x + at * rounded.input_bytes,
            rounded.scales + 4 * at * rounded.chunks, rounded.sums + 4 * at * rounded.chunks, y.ctypes.data + 4 * column,
            y.strides[0], bias,
        )  # fmt: skip
    return weight[TILES]


@compiled_part
def share_of(at, items, count):
    """(first, last) of the `at`-th of `items` even shares of `count`."""
    return count * at // items, count * (at + 1) // items


@compiled_part
def norm_part(x, start, norm, layer_norm, eps):
    """Normalise x [start : start + norm's size] in place."""
    part = x[start : start + norm.size]
    if layer_norm:
        layer_norm_row(part, norm, eps, part)
    else:
        norm_row(part, norm, eps, part)


@compiled_part
def rotate(x, start, half, cos, sin):
    """Rotate one head, which begins at x [start], to its position. In place."""
    whole = half // 16
    if whole:
        address = x.ctypes.data + 4 * start
        rotate16(address, address + 4 * half, cos.ctypes.data, sin.ctypes.data, whole)
    for i in range(16 * whole, half):
        a, b = x[start + i], x[start + half + i]
        x[start + i] = a * cos[i] - b * sin[i]
        x[start + half + i] = b * cos[i] + a * sin[i]


@compiled_part
def store_key_value(key, row, v_start, position, head_dim, value_dim, capacity, keys, values):
    """Store a head's key [head_dim] and its value, row [v_start …], at the addresses of that head's keys and values."""
    at = keys + 32 * head_dim * (position // 16) + 2 * (position % 16)
    whole = head_dim - head_dim % 16
    for i in range(0, whole, 16):
        store_halves16(at + 32 * i, key.ctypes.data + 4 * i, 32)
    for i in range(whole, head_dim):
        store_half(at + 32 * i, key[i])
    at = values + 32 * position
    whole = value_dim - value_dim % 16
    for i in range(0, whole, 16):
        store_halves16(at + 2 * capacity * i, row.ctypes.data + 4 * (v_start + i), 2)
    for i in range(whole, value_dim):
        store_half(at + 2 * capacity * whole + 2 * (i % 16), row[v_start + i])


@compiled_part
def first_seen(position, window, chunk):
    """The first position that one sees."""
    if chunk > 0:
        return position - position % chunk
    return max(0, position - window + 1) if window > 0 else 0


@compiled_part
def attend(
    query, q_stride, out, o_stride, count, position, later, window, chunk, keys, values, capacity, head_dim, value_dim, scores,
    scale, cap, bias, bias_stride, sink, sink_stride,
):  # fmt: skip
    """Attention of `count` queries; query r is at position + r * later. keys and values are addresses of one head's.

    `bias`, if not 0, is the address of what is added to the scores of each key, that of query r bias_stride * r bytes later;
    `sink` that of the score of no key.
    """
    last = position + (count - 1) * later
    begin = first_seen(position, window, chunk) // 16
    tiles_ = last // 16 + 1 - begin
    width = 16 * tiles_
    mine, s_stride = scores.ctypes.data, scores.strides[0]
    half_products(keys + begin * head_dim * 32, query, q_stride, head_dim, mine, s_stride, count, tiles_, head_dim * 32)
    for r in range(count):
        row = scores[r]
        high = position + r * later + 1 - 16 * begin
        low = first_seen(position + r * later, window, chunk) - 16 * begin
        factor = scale
        if cap > np.float32(0.0) or bias:
            factor = np.float32(1.0)
            if cap > np.float32(0.0):
                cap_row(row, low, high, scale, cap)
            else:
                for i in range(low, high):
                    row[i] *= scale
            if bias:
                added = floats(bias + r * bias_stride + 64 * begin, high)
                for i in range(low, high):
                    row[i] += added[i]
        row[:low] = _BELOW_ALL
        row[high:width] = _BELOW_ALL
        address = mine + r * s_stride
        largest = largest16(address, tiles_)
        if sink:
            no_key = floats(sink + r * sink_stride, 1)[0]
            largest = max(largest, no_key / factor)
            total = exp_scores16(address, tiles_, largest, factor) + exp(no_key - largest * factor)
        else:
            total = exp_scores16(address, tiles_, largest, factor)
        row[:low] = np.float32(0.0)
        row[high:width] = np.float32(0.0)
        scale16(address, tiles_, np.float32(1.0) / total)
    half_products(values + begin * 512, mine, s_stride, width, out, o_stride, count, value_dim // 16, capacity * 32)


@compiled_part
def cap_row(x, low, high, scale, cap):
    """x [low : high] = cap * tanh(scale * x / cap), in place."""
    factor = scale / cap
    for i in range(low, high):
        x[i] = cap * tanh(x[i] * factor)


@compiled_part
def gate_row(gate_up, up_column, out, inner, f):
    """out [inner] = act(gate) * up, or act(gate) alone; up begins at up_column. `f`: the record FORWARD, for its options."""
    one, half = np.float32(1.0), np.float32(0.5)
    activation, limit, offset = f.activation, f.gate_limit, f.up_offset
    if limit > np.float32(0.0):
        for i in range(inner):
            gate_up[i] = min(gate_up[i], limit)
            gate_up[up_column + i] = min(max(gate_up[up_column + i], -limit), limit)
    if activation == SILU:
        whole = inner // 16
        if whole:
            silu16(gate_up.ctypes.data, out.ctypes.data, whole)
        for i in range(16 * whole, inner):
            out[i] = gate_up[i] / (one + exp(-gate_up[i]))
    elif activation == GELU:
        for i in range(inner):
            gate = gate_up[i]
            out[i] = half * gate * (one + erf(gate * np.float32(0.70710678)))
    elif activation == GELU_TANH:
        for i in range(inner):
            gate = gate_up[i]
            out[i] = half * gate * (one + tanh(np.float32(0.79788456) * gate * (one + np.float32(0.044715) * gate * gate)))
    elif activation == GELU_QUICK:
        whole = inner // 16
        if whole:
            quick16(gate_up.ctypes.data, out.ctypes.data, whole)
        for i in range(16 * whole, inner):
            out[i] = gate_up[i] / (one + exp(np.float32(-1.702) * gate_up[i]))
    elif activation == RELU:
        for i in range(inner):
            out[i] = max(gate_up[i], np.float32(0.0))
    else:
        for i in range(inner):
            gate = max(gate_up[i], np.float32(0.0))
            out[i] = gate * gate
    if f.gated:
        for i in range(inner):
            out[i] *= gate_up[up_column + i] + offset
