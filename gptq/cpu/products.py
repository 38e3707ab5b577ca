"""Compiled matrix products of some rows: tiles of packed or dense weights, up to four rows at a time.

A row gets the same bits whichever rows are beside it: sums are made in the same order for any number of rows.
"""

from collections.abc import Callable
from typing import Any

from . import tiles
from .cpu_kernels import CHUNK_ROWS, CHUNKS, ISA, KIND, SCALE_ADDRESS, WEIGHT_ADDRESS, ZERO_ADDRESS
from .numba_compiler import compiled_part
from .numba_intrinsics import add16
from .tiles import LANES

MOST_TILE_ROWS = 4  # rows that are multiplied by a tile at a time: what is unpacked of it serves all of them


def _for_rows(tile: Callable[..., Any], *which: Any) -> tuple[Any, ...]:
    return tuple(tile(*which, rows, ISA) for rows in range(1, MOST_TILE_ROWS + 1))


def _packed(bits: int) -> Any:
    """f(rows, …) for `rows` from 1 to 4; the other arguments are those of `tiles.packed_tile`."""
    one, two, three, four = _for_rows(tiles.packed_tile, bits)

    @compiled_part
    def multiply(rows, w, s, z, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride):
        if rows == 4:
            four(w, s, z, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride)
        elif rows == 1:
            one(w, s, z, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride)
        elif rows == 2:
            two(w, s, z, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride)
        else:
            three(w, s, z, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride)

    return multiply


def _dense(kind: str) -> Any:
    """f(rows, …) for `rows` from 1 to 4; the other arguments are those of `tiles.dense_tile`."""
    one, two, three, four = _for_rows(tiles.dense_tile, kind)

    @compiled_part
    def multiply(rows, w, x, x_stride, count, y, y_stride):
        if rows == 4:
            four(w, x, x_stride, count, y, y_stride)
        elif rows == 1:
            one(w, x, x_stride, count, y, y_stride)
        elif rows == 2:
            two(w, x, x_stride, count, y, y_stride)
        else:
            three(w, x, x_stride, count, y, y_stride)

    return multiply


packed8, packed4, packed2 = _packed(8), _packed(4), _packed(2)
half, bfloat, single = _dense("half"), _dense("bfloat16"), _dense("float")


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
        for r in range(0, rows, MOST_TILE_ROWS):
            to, xr, count = y + 64 * t + r * y_stride, x + r * x_stride, min(MOST_TILE_ROWS, rows - r)
            xs, xz = x_scales + 4 * r * chunks, x_sums + 4 * r * chunks
            if kind == 4:
                packed4(count, w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
            elif kind == 8:
                packed8(count, w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
            elif kind == 2:
                packed2(count, w, s, z, xr, xs, xz, chunks, chunk_rows, to, y_stride)
            elif kind == 16:
                half(count, w, xr, x_stride, chunk_rows, to, y_stride)
            elif kind == 17:
                bfloat(count, w, xr, x_stride, chunk_rows, to, y_stride)
            else:
                single(count, w, xr, x_stride, chunk_rows, to, y_stride)
    if bias:
        for r in range(rows):
            for t in range(first, last):
                add16(y + 64 * t + r * y_stride, bias + 64 * t)


@compiled_part
def dense_row(kind, w, tile, count, x, y):
    """y [16] = x [count] times one dense tile of the tiles at w; addresses. `kind` is 16 for halves, 32 for fp32."""
    if kind == 16:
        half(1, w + tile * count * 2 * LANES, x, 0, count, y, 0)
    else:
        single(1, w + tile * count * 4 * LANES, x, 0, count, y, 0)


@compiled_part
def half_products(w, x, x_stride, count, y, y_stride, rows, tiles_, w_stride):
    """y[:rows, 16 t : 16 t + 16] of tiles of halves w_stride bytes apart, `rows` rows of x; addresses."""
    for t in range(tiles_):
        for r in range(0, rows, MOST_TILE_ROWS):
            count_of = min(MOST_TILE_ROWS, rows - r)
            half(count_of, w + t * w_stride, x + r * x_stride, x_stride, count, y + 64 * t + r * y_stride, y_stride)
