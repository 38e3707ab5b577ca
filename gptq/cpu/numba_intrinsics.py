"""What numba cannot say of single numbers: their bits, halves, and the counter that threads share."""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .instructions import F16, F32, I32, I64, V16F, call, load, store


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
    """Write an fp32 as a half."""

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
    """Add to the int64 there, for every thread to see; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """The int64 there, as the other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing: Any, long: Any) -> Any:
    """Wait a moment: a hint to the processor, or (long) one's turn given to whoever else wants to run."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            with builder.if_then(builder.trunc(arguments[0], ir.IntType(1))):
                call(builder, "sched_yield", I32)
        if platform.machine().lower() in ("x86_64", "amd64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(types.int64), generate
