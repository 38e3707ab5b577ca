"""LLVM instructions that several kernels use: vectors, memory by address, a loop."""

from typing import Any

from llvmlite import ir

I8, I16, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


V16F, V16I, V64B, V32H = vector(F32, 16), vector(I32, 16), vector(I8, 64), vector(I16, 32)


def splat(builder: Any, value: Any, count: int) -> Any:
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(vector(I32, count), [0] * count))


def constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = align
    return found


def store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def prefetch(builder: Any, address: Any) -> None:
    """Have the line at an address fetched for reading soon. Any address may be named, also one that is nobody's."""
    line = builder.inttoptr(address, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *(ir.Constant(I32, each) for each in (0, 3, 1)))  # reads, L1, data


def part(builder: Any, whole: Any, start: int, count: int) -> Any:
    return builder.shuffle_vector(whole, whole, ir.Constant(vector(I32, count), list(range(start, start + count))))


def join(builder: Any, a: Any, b: Any) -> Any:
    count = a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, 2 * count), list(range(2 * count))))


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [each.type for each in arguments]), name)
    return builder.call(function, arguments)


def loop(builder: Any, count: Any, name: str, start: list[Any], body: Any) -> list[Any]:
    """Emit: for i in range(count): values = body(builder, i, values). `count` is at least one."""
    before = builder.block
    block = builder.append_basic_block(name)
    after = builder.append_basic_block(f"{name}.end")
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    phis = []
    for value in start:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    values = body(builder, index, phis)
    following = builder.add(index, ir.Constant(I64, 1))
    end = builder.block
    index.add_incoming(following, end)
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, end)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return values
