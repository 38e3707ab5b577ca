"""Compiled parts of a forward: rounding x, a matrix product, norms, exp, and how threads divide the work.

They take arrays and addresses only. Threads claim items of a phase one by one, so a thread that the system has
suspended delays the others only while it holds an item.
"""

import numpy as np

from . import tiles
from .numba_compiler import compiled, compiled_part
from .numba_intrinsics import add16, bits_of_float, fetch, fetch_add, float_of_bits, pause
from .tiles import LANES, X_TOP

ISA = tiles.best_isa()
_HALVES = tiles.ISAS[ISA].halves
_TOP = np.float32(X_TOP)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, which its low bits then hold
_ROUND_BITS = np.int32(0x4B400000)

# Columns of the table of weights, which has a row for each weight (weight_table.py fills it).
KIND = 0  # bits of a packed weight (2, 4, 8); cpu_weights.HALF, BFLOAT16 or FLOAT of a dense one
INPUTS = 1  # K
TILES = 2  # T: outputs by sixteens
CHUNKS = 3  # C; 0 of a dense weight
CHUNK_ROWS = 4  # P; of a dense weight the rows of w
WEIGHT_ADDRESS, SCALE_ADDRESS, ZERO_ADDRESS = 5, 6, 7  # 0 where there is none
ORDER_START, BIAS_START = 8, 9  # in the arrays of all orders and biases; -1 where there is none
ROUNDED_BUFFER = 10  # which buffer of RoundedInput holds its input
ROUNDED_BEFORE = 11  # 1: a weight before it in the same product rounds the same input into that buffer
WEIGHT_COLUMNS = 12

_packed8_1, _packed8_4 = tiles.packed_tile(8, 1, ISA), tiles.packed_tile(8, 4, ISA)
_packed4_1, _packed4_4 = tiles.packed_tile(4, 1, ISA), tiles.packed_tile(4, 4, ISA)
_packed2_1, _packed2_4 = tiles.packed_tile(2, 1, ISA), tiles.packed_tile(2, 4, ISA)
_half_1, _half_4 = tiles.dense_tile("half", 1, ISA), tiles.dense_tile("half", 4, ISA)
_half_2, _half_3 = tiles.dense_tile("half", 2, ISA), tiles.dense_tile("half", 3, ISA)  # for heads that share keys
_bfloat_1, _bfloat_4 = tiles.dense_tile("bfloat16", 1, ISA), tiles.dense_tile("bfloat16", 4, ISA)
_float_1, _float_4 = tiles.dense_tile("float", 1, ISA), tiles.dense_tile("float", 4, ISA)


@compiled_part
def claim(counters, phase):
    """The next item of a phase that no thread has; counters int64 [phases, 16], zero before the first."""
    return fetch_add(counters.ctypes.data + 128 * phase, 1)


@compiled_part
def finish(counters, phase, mine, total):
    """Report that `mine` items are done, and wait until all are."""
    address = counters.ctypes.data + 128 * phase + 64
    if mine:
        fetch_add(address, mine)
    spins = 0
    while fetch(address) < total:
        spins += 1
        pause(1 if spins > 256 else 0)  # let other threads run: one of them may hold the last item


@compiled_part
def shares(counters, phase, items):
    """The items of a phase that fall to this thread. The loop ends when all items of all threads are done."""
    mine = 0
    at = claim(counters, phase)
    while at < items:
        yield at
        mine += 1
        at = claim(counters, phase)
    finish(counters, phase, mine, items)


@compiled_part
def exp(x):
    """fp32, relative error below 3e-7 (Cephes' polynomial, as in its expf)."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    power = bits_of_float(x * np.float32(1.44269504) + _ROUND) - _ROUND_BITS
    n = np.float32(power)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_of_bits((power + np.int32(127)) << np.int32(23))


@compiled_part
def tanh(x):
    """fp32, absolute error below 2e-7."""
    return np.float32(1.0) - np.float32(2.0) / (np.float32(1.0) + exp(x + x))


@compiled_part
def erf(x):
    """fp32, absolute error below 4e-7 (Abramowitz and Stegun 7.1.26)."""
    size = abs(x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * size)
    p = np.float32(1.061405429)
    p = p * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    found = np.float32(1.0) - p * t * exp(-size * size)
    return found if x >= np.float32(0.0) else -found


@compiled_part
def round_row(x, row, order, chunks, chunk_rows, x8, x16, x_scales, x_sums):
    """Round x fp32 [K] to 16 bits with a scale for each chunk, and store it as row `row` (x8 and x16 are the same memory)."""
    gathered = np.empty(128, np.float32)
    width = chunks * chunk_rows
    for c in range(chunks):
        start = c * chunk_rows
        if order.size:
            for i in range(chunk_rows):
                at = order[start + i]
                gathered[i] = x[max(at, 0)] if at >= 0 else np.float32(0.0)
        else:
            for i in range(chunk_rows):
                gathered[i] = x[start + i]
        largest = np.float32(0.0)
        for i in range(chunk_rows):
            largest = max(largest, abs(gathered[i]))
        scale = largest / _TOP
        inverse = _TOP / largest if largest > np.float32(1e-30) else np.float32(0.0)
        total = np.int32(0)
        if _HALVES:
            base = 2 * (row * width + start)
            for unit in range(chunk_rows // 32):
                for i in range(32):
                    n = bits_of_float(gathered[32 * unit + i] * inverse + _ROUND) - _ROUND_BITS
                    high = (n + np.int32(128)) >> np.int32(8)
                    total += n
                    x8[base + 64 * unit + i] = np.int8(high)
                    x8[base + 64 * unit + 32 + i] = np.int8(n - (high << np.int32(8)))
        else:
            base = row * width + start
            for i in range(chunk_rows):
                n = bits_of_float(gathered[i] * inverse + _ROUND) - _ROUND_BITS
                total += n
                x16[base + i] = np.int16(n)
        x_scales[row * chunks + c] = scale
        x_sums[row * chunks + c] = total


@compiled_part
def product(table, first, last, rows, x, x_stride, x8, x_scales, x_sums, y, y_stride, bias):
    """Tiles first … last of x W + bias. `table` is a row of the table of weights; x … bias are addresses.

    Dense weights take x fp32 [rows, K]. Packed ones take x8, x_scales, x_sums, which `round_row` made from x.
    """
    kind, chunks, chunk_rows = table[KIND], table[CHUNKS], table[CHUNK_ROWS]
    packed = kind <= 8
    tile_bytes = chunks * chunk_rows * LANES * kind // 8 if packed else chunk_rows * LANES * (4 if kind == 32 else 2)
    if packed:
        x, x_stride = x8, 2 * chunks * chunk_rows
    for t in range(first, last):
        w = table[WEIGHT_ADDRESS] + t * tile_bytes
        s, z = table[SCALE_ADDRESS] + t * chunks * 2 * LANES, table[ZERO_ADDRESS] + t * chunks * LANES
        r = 0
        while r < rows:
            to, xr = y + 64 * t + r * y_stride, x + r * x_stride
            xs, xz = x_scales + 4 * r * chunks, x_sums + 4 * r * chunks
            if rows - r >= 4:
                if kind == 4:
                    _packed4_4(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 8:
                    _packed8_4(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 2:
                    _packed2_4(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 16:
                    _half_4(w, xr, x_stride, chunk_rows, to, y_stride)
                elif kind == 17:
                    _bfloat_4(w, xr, x_stride, chunk_rows, to, y_stride)
                else:
                    _float_4(w, xr, x_stride, chunk_rows, to, y_stride)
                r += 4
            else:
                if kind == 4:
                    _packed4_1(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 8:
                    _packed8_1(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 2:
                    _packed2_1(w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
                elif kind == 16:
                    _half_1(w, xr, x_stride, chunk_rows, to, y_stride)
                elif kind == 17:
                    _bfloat_1(w, xr, x_stride, chunk_rows, to, y_stride)
                else:
                    _float_1(w, xr, x_stride, chunk_rows, to, y_stride)
                r += 1
    if bias:
        for r in range(rows):
            for t in range(first, last):
                add16(y + 64 * t + r * y_stride, bias + 64 * t)


@compiled_part
def dense_row(kind, w, tile, count, x, y):
    """y [16] = x [count] times one dense tile of the tiles at w; addresses. `kind` is 16 for halves, 32 for fp32."""
    if kind == 16:
        _half_1(w + tile * count * 2 * LANES, x, 0, count, y, 0)
    else:
        _float_1(w + tile * count * 4 * LANES, x, 0, count, y, 0)


@compiled_part
def norm_row(x, weight, eps, out):
    """RMSNorm of x [H] into out."""
    total = np.float32(0.0)
    for i in range(weight.size):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(weight.size) + eps)
    for i in range(weight.size):
        out[i] = x[i] * factor * weight[i]


@compiled_part
def layer_norm_row(x, weight, eps, out):
    """LayerNorm of x [H] into out, without a bias."""
    total = np.float32(0.0)
    for i in range(weight.size):
        total += x[i]
    mean = total / np.float32(weight.size)
    total = np.float32(0.0)
    for i in range(weight.size):
        total += (x[i] - mean) * (x[i] - mean)
    factor = np.float32(1.0) / np.sqrt(total / np.float32(weight.size) + eps)
    for i in range(weight.size):
        out[i] = (x[i] - mean) * factor * weight[i]


@compiled_part
def half_products(w, x, x_stride, count, y, y_stride, rows, tiles_, w_stride):
    """y[:rows, 16 t : 16 t + 16] of tiles of halves w_stride bytes apart, `rows` rows of x; addresses."""
    for t in range(tiles_):
        r = 0
        while r < rows:
            if rows - r >= 4:
                _half_4(w + t * w_stride, x + r * x_stride, x_stride, count, y + 64 * t + r * y_stride, y_stride)
                r += 4
            elif rows - r == 3:
                _half_3(w + t * w_stride, x + r * x_stride, x_stride, count, y + 64 * t + r * y_stride, y_stride)
                r += 3
            elif rows - r == 2:
                _half_2(w + t * w_stride, x + r * x_stride, x_stride, count, y + 64 * t + r * y_stride, y_stride)
                r += 2
            else:
                _half_1(w + t * w_stride, x + r * x_stride, x_stride, count, y + 64 * t + r * y_stride, y_stride)
                r += 1


@compiled
def arrange(tid, threads, counters, words, bits, taken, order, kind, w):
    """Copy GPTQ's words int32 [K * bits / 32, N] into tiles w uint8 [T][C][P/F][16][4] (tiles.py).

    Row k of a tile is row taken[k] of the file, none for -1. `order` is that of the instruction set; `kind` the bits
    of a number in w.
    """
    pieces = 8 // kind
    factor = 4 * pieces
    mask = np.int64(2**bits - 1)
    columns = words.shape[1]
    line = np.zeros(16, np.uint8)
    for t in shares(counters, 0, w.shape[0]):
        left = 16 * t
        width = min(16, columns - left)
        for c in range(w.shape[1]):
            for block in range(w.shape[2]):
                start = (c * w.shape[2] + block) * factor
                for j in range(4):
                    line[:] = 0
                    for piece in range(pieces):
                        k = taken[start + 4 * piece + order[j]]
                        if k < 0:
                            continue
                        row, shift = k * bits // 32, k * bits % 32
                        for n in range(width):
                            value = np.int64(words[row, left + n]) & np.int64(0xFFFFFFFF)
                            if shift + bits > 32:  # three bits may lie across two words
                                value |= np.int64(words[row + 1, left + n]) << 32
                            line[n] |= np.uint8(((value >> shift) & mask) << (kind * piece))
                    for n in range(16):
                        w[t, c, block, n, j] = line[n]
