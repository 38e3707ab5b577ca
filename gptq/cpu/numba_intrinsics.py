"""What numba has no words for: arrays at an address, the bits of a number, halves, and the counter that threads share."""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from .instructions import F16, F32, I32, I64, V16F, call, load, store


def _array_at(builder: Any, context: Any, kind: Any, address: Any, shape: tuple[Any, ...]) -> Any:
    """An array without gaps at an address. It holds no reference: whoever filled the record with addresses does."""
    array = make_array(kind)(context, builder)
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [size]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    pointer = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    populate_array(array, data=pointer, shape=shape, strides=tuple(strides), itemsize=size, meminfo=None)
    return array._getvalue()


def _vector_of(kind: Any) -> Any:
    """An intrinsic (address, count) -> the array [count] of that kind."""

    def vector(typing: Any, address: Any, count: Any) -> Any:
        array = types.Array(kind, 1, "C")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _array_at(builder, context, array, arguments[0], (arguments[1],))

        return array(types.int64, types.int64), generate

    return intrinsic(vector)


floats, integers, integers32 = _vector_of(types.float32), _vector_of(types.int64), _vector_of(types.int32)


@intrinsic
def float_rows(typing: Any, address: Any, rows: Any, width: Any) -> Any:
    """The fp32 array [rows][width] at an address."""
    array = types.Array(types.float32, 2, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _array_at(builder, context, array, arguments[0], tuple(arguments[1:]))

    return array(types.int64, types.int64, types.int64), generate


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """int32 -> the fp32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing: Any, value: Any) -> Any:
    """fp32 -> the int32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def store_half(typing: Any, address: Any, value: Any) -> Any:
    """Store an fp32 as a half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store(builder, builder.fptrunc(arguments[1], F16), arguments[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def add16(typing: Any, to: Any, address: Any) -> Any:
    """Add the 16 fp32 at one address to those at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (load(builder, each, V16F, 4) for each in arguments)
        store(builder, builder.fadd(a, b), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, atomically. Returns its value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """The int64 at an address, as other threads last wrote it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing: Any, long: Any) -> Any:
    """Wait a moment: a hint to the CPU, or (`long`) yield to any other thread that can run."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            with builder.if_then(builder.trunc(arguments[0], ir.IntType(1))):
                call(builder, "sched_yield", I32)
        if platform.machine().lower() in ("x86_64", "amd64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(types.int64), generate
