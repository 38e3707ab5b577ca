"""Sixteen outputs of a matrix product at a time, written as LLVM instructions for numba.

A vector's lanes are output columns, so nothing is ever added across lanes, scales are vectors too, and a
group of any size costs only the length of a loop. Packed layout (T tiles of 16 columns, C chunks of P rows,
P a multiple of 32 and at most 128; a chunk lies inside one group):

    w       [T][C][P/F][16][4] bytes: byte j of a column holds the unsigned integers of rows order[j],
            order[j] + 4 … of a block of F rows (4 at 8 bits, 8 at 4 bits, 16 at 2 bits; low bits first)
    scales  half [T][C][16]     zeros uint8 [T][C][16]
    x       2 bytes a number, [rows][C * P]; fp32 scale and int32 sum of each chunk [rows][C]

x is rounded to 16 bits (X_TOP steps to the largest of its chunk) and the products are summed exactly in
int32, so the only errors are that rounding and fp32's.

Dense layout: w [T][K][16] of half, bfloat16 or fp32; x fp32. Attention's two products have this form too.
"""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

X_TOP = 32639  # 127 * 256 + 127: high and low byte of x both fit int8
LANES = 16
UNIT = 32  # rows that the inner loop takes at a time

_I8, _I16, _I32, _I64, _F16, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


_V16F, _V16I, _V64B, _V32H = _vector(_F32, 16), _vector(_I32, 16), _vector(_I8, 64), _vector(_I16, 32)


def _splat(builder: Any, value: Any, count: int) -> Any:
    vector = builder.insert_element(ir.Constant(_vector(value.type, count), ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_vector(_I32, count), [0] * count))


def _constant(vector: Any, value: int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = align
    return found


def _store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _part(builder: Any, vector: Any, start: int, count: int) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(_vector(_I32, count), list(range(start, start + count))))


def _join(builder: Any, a: Any, b: Any) -> Any:
    count = a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, 2 * count), list(range(2 * count))))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [each.type for each in arguments]), name)
    return builder.call(function, arguments)


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
            word = _load(builder, builder.add(x, ir.Constant(_I64, k + 32 * at)), _I32, 4)
            out.append(_call(builder, "llvm.x86.avx512.vpdpbusd.512", _V16I, total, w, _splat(builder, word, 16)))
        return out

    @staticmethod
    def total(builder: Any, sums: list[Any]) -> Any:
        return builder.add(builder.shl(sums[0], _constant(_V16I, 8)), sums[1])


class _Vnni256(_Vnni512):
    """AVX-VNNI, the same in two halves."""

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        out = []
        half = _vector(_I32, 8)
        for at, total in enumerate(sums):
            word = _splat(builder, _load(builder, builder.add(x, ir.Constant(_I64, k + 32 * at)), _I32, 4), 8)
            halves = [
                _call(builder, "llvm.x86.avx512.vpdpbusd.256", half, _part(builder, total, h, 8), _part(builder, w, h, 8), word)
                for h in (0, 8)
            ]
            out.append(_join(builder, *halves))
        return out


class _Avx2:
    """AVX2: bytes of w widened to 16 bits where they lie, first the even, then the odd ones, times pairs of x."""

    sums = 1
    halves = False
    order = (0, 2, 1, 3)

    @staticmethod
    def multiply(builder: Any, sums: list[Any], w: Any, x: Any, k: int) -> list[Any]:
        total = sums[0]
        mask = _constant(_V16I, 0x00FF00FF)
        for at, pairs in enumerate((builder.and_(w, mask), builder.and_(builder.lshr(w, _constant(_V16I, 8)), mask))):
            word = _splat(builder, _load(builder, builder.add(x, ir.Constant(_I64, 2 * k + 4 * at)), _I32, 4), 8)
            halves = [
                _call(
                    builder,
                    "llvm.x86.avx2.pmadd.wd",
                    _vector(_I32, 8),
                    builder.bitcast(_part(builder, pairs, h, 8), _vector(_I16, 16)),
                    builder.bitcast(word, _vector(_I16, 16)),
                )
                for h in (0, 8)
            ]
            total = builder.add(total, _join(builder, *halves))
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
            value = builder.sext(_load(builder, builder.add(x, ir.Constant(_I64, 2 * (k + at))), _I16, 2), _I32)
            q = builder.and_(builder.lshr(w, _constant(_V16I, 8 * at)), _constant(_V16I, 255))
            total = builder.add(total, builder.mul(q, _splat(builder, value, 16)))
        return [total]

    total = _Avx2.total


WAYS: dict[str, Any] = {"vnni512": _Vnni512, "vnni256": _Vnni256, "avx2": _Avx2, "plain": _Plain}


def best_way() -> str:
    """The fastest of WAYS that this processor has."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return "vnni512"
    if features.get("avxvnni"):
        return "vnni256"
    return "avx2" if features.get("avx2") else "plain"


def _loop(builder: Any, count: Any, name: str, start: list[Any], body: Any) -> list[Any]:
    """for i in range(count): values = body(builder, i, values); count is at least one."""
    before = builder.block
    block = builder.append_basic_block(name)
    after = builder.append_basic_block(f"{name}.end")
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(_I64)
    index.add_incoming(ir.Constant(_I64, 0), before)
    phis = []
    for value in start:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    values = body(builder, index, phis)
    following = builder.add(index, ir.Constant(_I64, 1))
    end = builder.block
    index.add_incoming(following, end)
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, end)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return values


def packed_tile(bits: int, rows: int, way: str) -> Any:
    """An intrinsic f(w, scales, zeros, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride): y[r, 0:16] of `rows` rows.

    The first six are addresses of a tile's data (int64), y of fp32; y_stride in bytes. x's rows lie
    2 * chunks * chunk_rows bytes apart, x_scales fp32 and x_sums int32 4 * chunks.
    """
    how = WAYS[way]
    factor = {8: 4, 4: 8, 2: 16}[bits]  # rows of w in one 64-byte block
    blocks = UNIT // factor

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, scales, zeros, x, x_scales, x_sums, chunks, chunk_rows, y, y_stride = arguments
        number = lambda value: ir.Constant(_I64, value)  # noqa: E731
        chunk_bytes = builder.mul(chunk_rows, number(16 * bits // 8))
        units = builder.sdiv(chunk_rows, number(UNIT))
        x_stride = builder.mul(builder.mul(chunks, chunk_rows), number(2))
        s_stride = builder.mul(chunks, number(4))
        mask = _constant(_V16I, {8: 0xFF, 4: 0x0F0F0F0F, 2: 0x03030303}[bits])

        def chunk(builder: Any, c: Any, totals: list[Any]) -> list[Any]:
            w_chunk = builder.add(w, builder.mul(c, chunk_bytes))
            x_chunk = builder.add(x, builder.mul(builder.mul(c, chunk_rows), number(2)))

            def unit(builder: Any, u: Any, sums: list[Any]) -> list[Any]:
                sums = list(sums)
                w_unit = builder.add(w_chunk, builder.mul(u, number(blocks * 64)))
                x_unit = builder.add(x_chunk, builder.mul(u, number(2 * UNIT)))
                for block in range(blocks):
                    word = _load(builder, builder.add(w_unit, number(64 * block)), _V16I, 64)
                    for piece in range(factor // 4):
                        q = word if bits == 8 else builder.and_(builder.lshr(word, _constant(_V16I, bits * piece)), mask)
                        for r in range(rows):
                            mine = slice(r * how.sums, (r + 1) * how.sums)
                            x_row = builder.add(x_unit, builder.mul(x_stride, number(r)))
                            sums[mine] = how.multiply(builder, sums[mine], q, x_row, block * factor + 4 * piece)
                return sums

            none = [_constant(_V16I, 0)] * (rows * how.sums)
            sums = _loop(builder, units, "unit", none, unit)
            place = builder.mul(c, number(LANES))
            halves = _load(builder, builder.add(scales, builder.mul(place, number(2))), _vector(_F16, 16), 32)
            scale = builder.fpext(halves, _V16F)
            zero = builder.zext(_load(builder, builder.add(zeros, place), _vector(_I8, 16), 16), _V16I)
            out = []
            for r in range(rows):
                mine = sums[r * how.sums : (r + 1) * how.sums]
                side = builder.add(builder.mul(s_stride, number(r)), builder.mul(c, number(4)))
                x_sum = _splat(builder, _load(builder, builder.add(x_sums, side), _I32, 4), 16)
                x_scale = _splat(builder, _load(builder, builder.add(x_scales, side), _F32, 4), 16)
                exact = builder.sub(how.total(builder, mine), builder.mul(zero, x_sum))
                value = builder.fmul(builder.sitofp(exact, _V16F), builder.fmul(scale, x_scale))
                out.append(builder.fadd(totals[r], value, flags=("contract",)))
            return out

        totals = _loop(builder, chunks, "chunk", [ir.Constant(_V16F, [0.0] * 16)] * rows, chunk)
        for r, total in enumerate(totals):
            _store(builder, total, builder.add(y, builder.mul(y_stride, number(r))))
        return context.get_dummy_value()

    def tile(typing: Any, w: Any, s: Any, z: Any, x: Any, xs: Any, xz: Any, c: Any, p: Any, y: Any, ys: Any) -> Any:
        return types.void(*[types.int64] * 10), generate

    tile.__name__ = f"packed_tile_{bits}_{rows}_{way}"
    return intrinsic(tile)


DENSE = {"half": _F16, "bfloat16": _I16, "float": _F32}


def dense_tile(kind: str, rows: int, way: str) -> Any:
    """An intrinsic f(w, x, x_stride, count, y, y_stride): y[r, 0:16] = sum over k < count of x[r, k] * w[k, 0:16].

    Addresses (int64), strides in bytes, count a multiple of four.
    """
    # Sums that do not wait for each other; as many for one row as for several, so that these give the same bits.
    chains = 4 if way == "vnni512" else 2  # AVX-512 has registers for more
    size = {"half": 2, "bfloat16": 2, "float": 4}[kind]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, x, x_stride, count, y, y_stride = arguments
        number = lambda value: ir.Constant(_I64, value)  # noqa: E731

        def four(builder: Any, at: Any, sums: list[Any]) -> list[Any]:
            sums = list(sums)
            w_four = builder.add(w, builder.mul(at, number(4 * LANES * size)))
            x_four = builder.add(x, builder.mul(at, number(16)))
            for k in range(4):
                found = _load(builder, builder.add(w_four, number(k * LANES * size)), _vector(DENSE[kind], 16), LANES * size)
                if kind == "half":
                    found = builder.fpext(found, _V16F)
                elif kind == "bfloat16":
                    found = builder.bitcast(builder.shl(builder.zext(found, _V16I), _constant(_V16I, 16)), _V16F)
                for r in range(rows):
                    place = builder.add(builder.mul(x_stride, number(r)), number(4 * k))
                    value = _splat(builder, _load(builder, builder.add(x_four, place), _F32, 4), 16)
                    mine = r * chains + k % chains
                    product = builder.fmul(found, value, flags=("contract",))
                    sums[mine] = builder.fadd(sums[mine], product, flags=("contract",))
            return sums

        none = [ir.Constant(_V16F, [0.0] * 16)] * (rows * chains)
        sums = _loop(builder, builder.sdiv(count, number(4)), "four", none, four)
        for r in range(rows):
            total = sums[r * chains]
            for each in sums[r * chains + 1 : (r + 1) * chains]:
                total = builder.fadd(total, each)
            _store(builder, total, builder.add(y, builder.mul(y_stride, number(r))))
        return context.get_dummy_value()

    def tile(typing: Any, w: Any, x: Any, x_stride: Any, count: Any, y: Any, y_stride: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    tile.__name__ = f"dense_tile_{kind}_{rows}"
    return intrinsic(tile)


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """int32 -> the fp32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing: Any, value: Any) -> Any:
    """fp32 -> the int32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def store_half(typing: Any, address: Any, value: Any) -> Any:
    """Write an fp32 as a half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, builder.fptrunc(arguments[1], _F16), arguments[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def add16(typing: Any, to: Any, address: Any) -> Any:
    """Add the 16 fp32 at one address to those at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (_load(builder, each, _V16F, 4) for each in arguments)
        _store(builder, builder.fadd(a, b), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 there, for every thread to see; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """The int64 there, as the other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing: Any, long: Any) -> Any:
    """Wait a moment: a hint to the processor, or (long) one's turn given to whoever else wants to run."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            with builder.if_then(builder.trunc(arguments[0], ir.IntType(1))):
                _call(builder, "sched_yield", _I32)
        if platform.machine().lower() in ("x86_64", "amd64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(types.int64), generate
