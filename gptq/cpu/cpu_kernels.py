"""Compiled parts of a forward: rounding x, norms, exp, and how threads divide the work.

They take arrays and addresses only. Threads claim items of a phase one by one, so a thread that the system has
suspended delays the others only while it holds an item.
"""

import numpy as np

from . import tiles
from .numba_compiler import compiled, compiled_part
from .numba_intrinsics import bits_of_float, fetch, fetch_add, float_of_bits, pause
from .tiles import X_TOP
from .vector_ops import largest_size16, rounder

ISA = tiles.best_isa()
_TOP = np.float32(X_TOP)
_rounded = rounder(tiles.ISAS[ISA].halves)
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


@compiled_part
def claim(counters, phase):
    """The next item of a phase that no thread has. `counters`: address of int64 [phases, 16], zero before the first."""
    return fetch_add(counters + 128 * phase, 1)


@compiled_part
def finish(counters, phase, mine, total):
    """Report that `mine` items are done, and wait until all are."""
    address = counters + 128 * phase + 64
    if mine:
        fetch_add(address, mine)
    spins = 0
    while fetch(address) < total:
        spins += 1
        pause(1 if spins > 256 else 0)  # let other threads run: one of them may hold the last item


@compiled_part
def shares(counters, phase, items):
    """The items of a phase that fall to this thread. The loop ends when all items of all threads are done.

    numba never lets go of an array that a generator was given: no argument here may be one.
    """
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
def round_row(x, row, order, chunks, chunk_rows, to, x_scales, x_sums):
    """Round x fp32 [K] to 16 bits with a scale for each chunk, and store it at the address `to` as row `row`."""
    gathered = np.empty(128, np.float32)
    for c in range(chunks):
        start = c * chunk_rows
        address = x.ctypes.data + 4 * start
        if order.size:
            address = gathered.ctypes.data
            for i in range(chunk_rows):
                at = order[start + i]
                gathered[i] = x[max(at, 0)] if at >= 0 else np.float32(0.0)
        largest = largest_size16(address, chunk_rows // 16)
        inverse = _TOP / largest if largest > np.float32(1e-30) else np.float32(0.0)
        x_scales[row * chunks + c] = largest / _TOP
        x_sums[row * chunks + c] = _rounded(address, chunk_rows // 32, inverse, to + 2 * (row * chunks * chunk_rows + start))


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
