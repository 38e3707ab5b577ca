"""Sixteen outputs of a matrix product at a time, written as LLVM instructions for numba.

The lanes of a vector are output columns. So nothing is added across lanes, scales are vectors too, and the size of
a group is only the length of a loop. Packed layout (T tiles of 16 columns, C chunks of P rows, P a multiple of 32
and at most 128; a chunk lies inside one group):

    w       [T][C][P/F][16][4] bytes: byte j of a column holds the unsigned integers of rows order[j],
            order[j] + 4 … of a block of F rows (4 at 8 bits, 8 at 4 bits, 16 at 2 bits; low bits first)
    scales  half [T][C][16]     zeros uint8 [T][C][16]
    x       2 bytes a number, [rows][C * P]; fp32 scale and int32 sum of each chunk [rows][C]

x is rounded to 16 bits (the largest of a chunk becomes X_TOP). The products are summed exactly in int32, so the
only errors are that rounding and those of fp32.

Dense layout: w [T][K][16] of half, bfloat16 or fp32; x fp32. The two products of attention use it too.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .instructions import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    V16F,
    V16I,
    call,
    constant,
    join,
    load,
    loop,
    part,
    prefetch,
    splat,
    store,
    vector,
)

X_TOP = 32639  # 127 * 256 + 127: high and low byte of x both fit int8
LANES = 16
UNIT = 32  # rows that the inner loop takes at a time
_AHEAD = 1024  # rows: how far ahead packed weights are fetched; a tile follows the one before in memory
_LINE = 64  # bytes that come from memory at a time


class _Vnni512:
    """AVX-512 VNNI: unsigned bytes of w times signed high and low bytes of x."""

    sums = 2  # accumulators for each row of x
    halves = True  # x is stored as 32 high bytes, then their 32 low bytes; else as 16-bit numbers
    order = (0, 1, 2, 3)

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        """w <16 x i32> (4 unsigned bytes a lane), x the address of a unit of 32 numbers, k the first of the four."""
        out = []
        for at, total in enumerate(sums):
            word = load(builder, builder.add(x, ir.Constant(I64, k + 32 * at)), I32, 4)
            out.append(call(builder, "llvm.x86.avx512.vpdpbusd.512", V16I, total, w, splat(builder, word, 16)))
        return out

    @staticmethod
    def total(builder: Any, sums: list[Any]) -> Any:
        return builder.add(builder.shl(sums[0], constant(V16I, 8)), sums[1])


class _Vnni256(_Vnni512):
    """AVX-VNNI: the same in two halves."""

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        out = []
        half = vector(I32, 8)
        for at, total in enumerate(sums):
            word = splat(builder, load(builder, builder.add(x, ir.Constant(I64, k + 32 * at)), I32, 4), 8)
            halves = [
                call(builder, "llvm.x86.avx512.vpdpbusd.256", half, part(builder, total, h, 8), part(builder, w, h, 8), word)
                for h in (0, 8)
            ]
            out.append(join(builder, *halves))
        return out


class _Avx2:
    """AVX2: bytes of w, widened in place to 16 bits (the even ones, then the odd ones), times pairs of x."""

    sums = 1
    halves = False
    order = (0, 2, 1, 3)

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        total = sums[0]
        mask = constant(V16I, 0x00FF00FF)
        for at, pairs in enumerate((builder.and_(w, mask), builder.and_(builder.lshr(w, constant(V16I, 8)), mask))):
            word = splat(builder, load(builder, builder.add(x, ir.Constant(I64, 2 * k + 4 * at)), I32, 4), 8)
            halves = [
                call(
                    builder,
                    "llvm.x86.avx2.pmadd.wd",
                    vector(I32, 8),
                    builder.bitcast(part(builder, pairs, h, 8), vector(I16, 16)),
                    builder.bitcast(word, vector(I16, 16)),
                )
                for h in (0, 8)
            ]
            total = builder.add(total, join(builder, *halves))
        return [total]

    @staticmethod
    def total(builder: Any, sums: list[Any]) -> Any:
        return sums[0]


class _Plain:
    """Any processor: LLVM's own vectors."""

    sums = 1
    halves = False
    order = (0, 1, 2, 3)

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        total = sums[0]
        for at in range(4):
            value = builder.sext(load(builder, builder.add(x, ir.Constant(I64, 2 * (k + at))), I16, 2), I32)
            q = builder.and_(builder.lshr(w, constant(V16I, 8 * at)), constant(V16I, 255))
            total = builder.add(total, builder.mul(q, splat(builder, value, 16)))
        return [total]

    total = _Avx2.total


ISAS: dict[str, Any] = {"vnni512": _Vnni512, "vnni256": _Vnni256, "avx2": _Avx2, "plain": _Plain}


def best_isa() -> str:
    """The fastest of ISAS that this CPU has."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return "vnni512"
    if features.get("avxvnni"):
        return "vnni256"
    return "avx2" if features.get("avx2") else "plain"


def packed_tile(bits: int, rows: int, isa: str) -> Any:
    """An intrinsic f(w, scales, zeros, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride): y[r, 0:16] of `rows` rows.

    The first six are addresses of a tile's data (int64), y of fp32; y_stride in bytes. x's rows lie
    2 * chunks * chunk_rows bytes apart, x_scales fp32 and x_sums int32 4 * chunks.
    """
    how = ISAS[isa]
    factor = {8: 4, 4: 8, 2: 16}[bits]  # rows of w in one 64-byte block
    blocks = UNIT // factor

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, scales, zeros, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride = arguments
        number = lambda value: ir.Constant(I64, value)  # noqa: E731
        chunk_bytes = builder.mul(chunk_rows, number(16 * bits // 8))
        units = builder.sdiv(chunk_rows, number(UNIT))
        x_stride = builder.mul(builder.mul(chunks, chunk_rows), number(2))
        s_stride = builder.mul(chunks, number(4))
        ahead = builder.sdiv(number(_AHEAD), chunk_rows)
        w_ahead, lanes_ahead = builder.mul(chunk_bytes, ahead), builder.mul(ahead, number(LANES))
        mask = constant(V16I, {8: 0xFF, 4: 0x0F0F0F0F, 2: 0x03030303}[bits])

        def chunk(builder: Any, c: Any, totals: list[Any]) -> list[Any]:
            w_chunk = builder.add(w, builder.mul(c, chunk_bytes))
            x_chunk = builder.add(x, builder.mul(builder.mul(c, chunk_rows), number(2)))

            def unit(builder: Any, u: Any, sums: list[Any]) -> list[Any]:
                sums = list(sums)
                w_unit = builder.add(w_chunk, builder.mul(u, number(blocks * 64)))
                x_unit = builder.add(x_chunk, builder.mul(u, number(2 * UNIT)))
                w_later = builder.add(w_unit, w_ahead)
                for block in range(blocks):
                    prefetch(builder, builder.add(w_later, number(_LINE * block)))
                    word = load(builder, builder.add(w_unit, number(64 * block)), V16I, 64)
                    for piece in range(factor // 4):
                        q = word if bits == 8 else builder.and_(builder.lshr(word, constant(V16I, bits * piece)), mask)
                        for r in range(rows):
                            mine = slice(r * how.sums, (r + 1) * how.sums)
                            x_row = builder.add(x_unit, builder.mul(x_stride, number(r)))
                            sums[mine] = how.multiply(builder, sums[mine], q, x_row, block * factor + 4 * piece)
                return sums

            none = [constant(V16I, 0)] * (rows * how.sums)
            sums = loop(builder, units, "unit", none, unit)
            column = builder.mul(c, number(LANES))
            later = builder.add(column, lanes_ahead)
            prefetch(builder, builder.add(scales, builder.mul(later, number(2))))
            prefetch(builder, builder.add(zeros, later))
            halves = load(builder, builder.add(scales, builder.mul(column, number(2))), vector(F16, 16), 32)
            scale = builder.fpext(halves, V16F)
            zero = builder.zext(load(builder, builder.add(zeros, column), vector(I8, 16), 16), V16I)
            out = []
            for r in range(rows):
                mine = sums[r * how.sums : (r + 1) * how.sums]
                chunk_at = builder.add(builder.mul(s_stride, number(r)), builder.mul(c, number(4)))
                x_sum = splat(builder, load(builder, builder.add(x_sums, chunk_at), I32, 4), 16)
                x_scale = splat(builder, load(builder, builder.add(x_scales, chunk_at), F32, 4), 16)
                exact = builder.sub(how.total(builder, mine), builder.mul(zero, x_sum))
                value = builder.fmul(builder.sitofp(exact, V16F), builder.fmul(scale, x_scale))
                out.append(builder.fadd(totals[r], value, flags=("contract",)))
            return out

        totals = loop(builder, chunks, "chunk", [ir.Constant(V16F, [0.0] * 16)] * rows, chunk)
        for r, total in enumerate(totals):
            store(builder, total, builder.add(y, builder.mul(y_stride, number(r))))
        return context.get_dummy_value()

    def tile(typing: Any, w: Any, s: Any, z: Any, x: Any, xs: Any, xz: Any, c: Any, p: Any, y: Any, ys: Any) -> Any:
        return types.void(*[types.int64] * 10), generate

    tile.__name__ = f"packed_tile_{bits}_{rows}_{isa}"
    return intrinsic(tile)


DENSE = {"half": F16, "bfloat16": I16, "float": F32}


def dense_tile(kind: str, rows: int, isa: str) -> Any:
    """An intrinsic f(w, x, x_stride, count, y, y_stride): y[r, 0:16] = sum over k < count of x[r, k] * w[k, 0:16].

    Addresses (int64), strides in bytes, count a multiple of four.
    """
    # Independent sums. One row has as many as several rows, so that both give the same bits.
    chains = 4 if isa == "vnni512" else 2  # AVX-512 has registers for more
    size = {"half": 2, "bfloat16": 2, "float": 4}[kind]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, x, x_stride, count, y, y_stride = arguments
        number = lambda value: ir.Constant(I64, value)  # noqa: E731

        def four(builder: Any, at: Any, sums: list[Any]) -> list[Any]:
            sums = list(sums)
            w_four = builder.add(w, builder.mul(at, number(4 * LANES * size)))
            x_four = builder.add(x, builder.mul(at, number(16)))
            for k in range(4):
                found = load(builder, builder.add(w_four, number(k * LANES * size)), vector(DENSE[kind], 16), LANES * size)
                if kind == "half":
                    found = builder.fpext(found, V16F)
                elif kind == "bfloat16":
                    found = builder.bitcast(builder.shl(builder.zext(found, V16I), constant(V16I, 16)), V16F)
                for r in range(rows):
                    offset = builder.add(builder.mul(x_stride, number(r)), number(4 * k))
                    value = splat(builder, load(builder, builder.add(x_four, offset), F32, 4), 16)
                    mine = r * chains + k % chains
                    product = builder.fmul(found, value, flags=("contract",))
                    sums[mine] = builder.fadd(sums[mine], product, flags=("contract",))
            return sums

        none = [ir.Constant(V16F, [0.0] * 16)] * (rows * chains)
        sums = loop(builder, builder.sdiv(count, number(4)), "four", none, four)
        for r in range(rows):
            total = sums[r * chains]
            for each in sums[r * chains + 1 : (r + 1) * chains]:
                total = builder.fadd(total, each)
            store(builder, total, builder.add(y, builder.mul(y_stride, number(r))))
        return context.get_dummy_value()

    def tile(typing: Any, w: Any, x: Any, x_stride: Any, count: Any, y: Any, y_stride: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    tile.__name__ = f"dense_tile_{kind}_{rows}"
    return intrinsic(tile)
