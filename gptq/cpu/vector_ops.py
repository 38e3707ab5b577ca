"""Sixteen numbers at a time, written as LLVM instructions for numba: softmax, SiLU, rounding, rotation, halves.

numba leaves a loop around `cpu_kernels.exp` scalar. These give the same numbers but for the order of a sum.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .instructions import F16, I8, I16, I32, I64, V16F, V16I, call, constant, load, loop, part, splat, store, vector

_FUSED = ("contract",)
# Cephes' polynomial for expf, highest power first, as in cpu_kernels.exp.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which its low bits then hold
_ROUND_BITS = 0x4B400000


def _float(value: float) -> Any:
    return constant(V16F, value)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)


def _exp(builder: Any, x: Any) -> Any:
    """<16 x float> -> exp, relative error below 3e-7 from -87 to 88; beyond, the value at that end. NaN stays NaN."""
    for bound, sign in ((-87.0, "<"), (88.0, ">")):
        x = builder.select(builder.fcmp_ordered(sign, x, _float(bound)), _float(bound), x)
    rounded = builder.fadd(builder.fmul(x, _float(1.44269504)), _float(_ROUND))  # not fused: its low bits are the integer
    power = builder.sub(builder.bitcast(rounded, V16I), constant(V16I, _ROUND_BITS))
    n = builder.sitofp(power, V16F)
    r = _multiply_add(builder, n, _float(-0.693359375), x)
    r = _multiply_add(builder, n, _float(2.12194440e-4), r)
    p = _float(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = _multiply_add(builder, p, r, _float(coefficient))
    p = builder.fadd(_multiply_add(builder, builder.fmul(p, r, flags=_FUSED), r, r), _float(1.0))
    scale = builder.bitcast(builder.shl(builder.add(power, constant(V16I, 127)), constant(V16I, 23)), V16F)
    return builder.fmul(p, scale)


def _address(builder: Any, start: Any, block: Any) -> Any:
    return builder.add(start, builder.mul(block, ir.Constant(I64, 64)))


def _lanes(builder: Any, values: Any) -> list[Any]:
    return [builder.extract_element(values, ir.Constant(ir.IntType(32), at)) for at in range(16)]


@intrinsic
def largest16(typing: Any, x: Any, blocks: Any) -> Any:
    """(address, count) -> the largest of 16 * count fp32; NaNs are passed over."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks = arguments

        def larger(builder: Any, a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        def block(builder: Any, at: Any, found: list[Any]) -> list[Any]:
            return [larger(builder, found[0], load(builder, _address(builder, x, at), V16F, 4))]

        (most,) = loop(builder, blocks, "largest", [_float(-3.0e38)], block)
        first, *others = _lanes(builder, most)
        for each in others:
            first = larger(builder, first, each)
        return first

    return types.float32(types.int64, types.int64), generate


@intrinsic
def exp_scores16(typing: Any, x: Any, blocks: Any, largest: Any, factor: Any) -> Any:
    """(address, count, largest, factor): 16 * count fp32 become exp((x - largest) * factor) in place. Returns their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks, largest, factor = arguments
        largest, factor = splat(builder, largest, 16), splat(builder, factor, 16)

        def block(builder: Any, at: Any, totals: list[Any]) -> list[Any]:
            address = _address(builder, x, at)
            value = _exp(builder, builder.fmul(builder.fsub(load(builder, address, V16F, 4), largest), factor))
            store(builder, value, address)
            return [builder.fadd(totals[0], value)]

        (totals,) = loop(builder, blocks, "exp", [_float(0.0)], block)
        first, *others = _lanes(builder, totals)
        for each in others:
            first = builder.fadd(first, each)
        return first

    return types.float32(types.int64, types.int64, types.float32, types.float32), generate


@intrinsic
def scale16(typing: Any, x: Any, blocks: Any, factor: Any) -> Any:
    """(address, count, factor): multiply 16 * count fp32 in place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks, factor = arguments
        factor = splat(builder, factor, 16)

        def block(builder: Any, at: Any, nothing: list[Any]) -> list[Any]:
            address = _address(builder, x, at)
            store(builder, builder.fmul(load(builder, address, V16F, 4), factor), address)
            return nothing

        loop(builder, blocks, "scale", [], block)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


def _sigmoid_times_x(name: str, meaning: str, factor: float) -> Any:
    """An intrinsic (address, address, count): out = x / (1 + exp(-factor * x)) of 16 * count fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, out, blocks = arguments

        def block(builder: Any, at: Any, nothing: list[Any]) -> list[Any]:
            value = load(builder, _address(builder, x, at), V16F, 4)
            below = builder.fsub(_float(0.0), value) if factor == 1 else builder.fmul(_float(-factor), value)
            below = builder.fadd(_float(1.0), _exp(builder, below))
            store(builder, builder.fdiv(value, below), _address(builder, out, at))
            return nothing

        loop(builder, blocks, name, [], block)
        return context.get_dummy_value()

    def sigmoid_times_x(typing: Any, x: Any, out: Any, blocks: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64), generate

    sigmoid_times_x.__name__, sigmoid_times_x.__doc__ = name, meaning
    return intrinsic(sigmoid_times_x)


silu16 = _sigmoid_times_x("silu16", "SiLU", 1.0)
quick16 = _sigmoid_times_x("quick16", "Quick GELU", 1.702)


@intrinsic
def largest_size16(typing: Any, x: Any, blocks: Any) -> Any:
    """(address, count) -> the largest absolute value of 16 * count fp32; NaNs are passed over."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks = arguments

        def block(builder: Any, at: Any, found: list[Any]) -> list[Any]:
            size = call(builder, "llvm.fabs.v16f32", V16F, load(builder, _address(builder, x, at), V16F, 4))
            return [builder.select(builder.fcmp_ordered(">", size, found[0]), size, found[0])]

        (most,) = loop(builder, blocks, "size", [_float(0.0)], block)
        count = 16
        while count > 1:  # halves against halves: no order changes which is the largest
            count //= 2
            low, high = part(builder, most, 0, count), part(builder, most, count, count)
            most = builder.select(builder.fcmp_ordered(">", high, low), high, low)
        return builder.extract_element(most, ir.Constant(I32, 0))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def rotate16(typing: Any, a: Any, b: Any, cos: Any, sin: Any, blocks: Any) -> Any:
    """(addresses of fp32, count): 16 * count pairs of numbers are turned, in place: a cos - b sin, b cos + a sin."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        addresses, blocks = arguments[:4], arguments[4]

        def block(builder: Any, at: Any, nothing: list[Any]) -> list[Any]:
            a_at, b_at, *of_angles = (_address(builder, each, at) for each in addresses)
            a, b, cos, sin = (load(builder, each, V16F, 4) for each in (a_at, b_at, *of_angles))
            minus = builder.fsub(_float(0.0), sin)
            store(builder, _multiply_add(builder, b, minus, builder.fmul(a, cos)), a_at)
            store(builder, _multiply_add(builder, a, sin, builder.fmul(b, cos)), b_at)
            return nothing

        loop(builder, blocks, "rotate", [], block)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def store_halves16(typing: Any, to: Any, x: Any, stride: Any) -> Any:
    """Store the 16 fp32 at x as halves, `stride` bytes apart; addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, x, stride = arguments
        halves = builder.bitcast(builder.fptrunc(load(builder, x, V16F, 4), vector(F16, 16)), vector(I16, 16))
        side_by_side = builder.icmp_signed("==", stride, ir.Constant(I64, 2))
        with builder.if_else(side_by_side) as (whole, apart):
            with whole:
                store(builder, halves, to, 2)
            with apart:
                for at, each in enumerate(_lanes(builder, halves)):
                    store(builder, each, builder.add(to, builder.mul(stride, ir.Constant(I64, at))), 2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def rounder(halves: bool) -> Any:
    """An intrinsic (x, count, inverse, to): 32 * count fp32 at x times `inverse` become 16-bit integers at `to`, int64 addresses.

    They are stored as 32 high bytes and then their 32 low ones (`halves`), or as they are. Returns the integers' sum.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, units, inverse, to = arguments
        inverse = splat(builder, inverse, 16)

        def unit(builder: Any, at: Any, totals: list[Any]) -> list[Any]:
            total = totals[0]
            for half in range(2):
                offset = builder.mul(at, ir.Constant(I64, 64))  # bytes of 32 rounded numbers
                mine = builder.add(builder.mul(offset, ir.Constant(I64, 2)), ir.Constant(I64, 64 * half))
                value = load(builder, builder.add(x, mine), V16F, 4)
                raised = _multiply_add(builder, value, inverse, _float(_ROUND))
                n = builder.sub(builder.bitcast(raised, V16I), constant(V16I, _ROUND_BITS))
                total = builder.add(total, n)
                if halves:
                    high = builder.ashr(builder.add(n, constant(V16I, 128)), constant(V16I, 8))
                    low = builder.sub(n, builder.shl(high, constant(V16I, 8)))
                    for place, each in enumerate((high, low)):
                        address = builder.add(to, builder.add(offset, ir.Constant(I64, 32 * place + 16 * half)))
                        store(builder, builder.trunc(each, vector(I8, 16)), address, 1)
                else:
                    address = builder.add(to, builder.add(offset, ir.Constant(I64, 32 * half)))
                    store(builder, builder.trunc(n, vector(I16, 16)), address, 2)
            return [total]

        (total,) = loop(builder, units, "round", [constant(V16I, 0)], unit)
        first, *others = _lanes(builder, total)
        for each in others:
            first = builder.add(first, each)
        return first

    def rounded(typing: Any, x: Any, count: Any, inverse: Any, to: Any) -> Any:
        return types.int32(types.int64, types.int64, types.float32, types.int64), generate

    rounded.__name__ = f"rounded_{'halves' if halves else 'whole'}"
    return intrinsic(rounded)
