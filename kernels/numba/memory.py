"""Plain and atomic access to memory by address, for kernels that share jobs between threads."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import helper, intrinsic

_ORDER = "seq_cst"
FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # Linux: number of the system call, by machine


@intrinsic
def peek(typingctx, address, witness):  # type: ignore[no-untyped-def]
    """The scalar at `address`; `witness` is any value of the wanted type."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(witness)
        size = context.get_abi_sizeof(kind)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=size)

    return witness(types.int64, witness), codegen


@intrinsic
def poke(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write a scalar to `address`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        size = context.get_abi_sizeof(args[1].type)
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


def extend_half(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """fp16 to fp32, exactly, from the bits of one number or of a vector of them."""
    lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 0

    def of(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, lanes) if lanes else element

    def constant(value: float, element: ir.Type) -> ir.Constant:
        return ir.Constant(of(element), [value] * lanes if lanes else value)

    if has_feature("f16c") or platform.machine() in ("aarch64", "arm64"):
        return builder.fpext(builder.bitcast(bits, of(ir.HalfType())), of(ir.FloatType()))
    # Elsewhere LLVM would call a library function that is not there, and abort. Scaling moves the exponent, and makes
    # subnormals normal; infinity and NaN need theirs set.
    word = ir.IntType(32)
    wide = builder.zext(bits, of(word))
    magnitude = builder.shl(builder.and_(wide, constant(0x7FFF, word)), constant(13, word))
    scaled = builder.fmul(builder.bitcast(magnitude, of(ir.FloatType())), constant(2.0**112, ir.FloatType()))
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13, word))
    infinite = builder.or_(magnitude, constant(0x7F800000, word))
    finite = builder.bitcast(scaled, of(word))
    sign = builder.shl(builder.and_(wide, constant(0x8000, word)), constant(16, word))
    return builder.bitcast(builder.or_(builder.select(special, infinite, finite), sign), of(ir.FloatType()))


def round_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Bits of the nearest fp16 (ties to even) of an fp32 number; too large ones become infinity."""
    word, half = ir.IntType(32), ir.IntType(16)
    if has_feature("f16c") or platform.machine() in ("aarch64", "arm64"):
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), half)
    # Elsewhere LLVM would call a library function. Adding one half makes the processor round subnormals at the right
    # bit; normal numbers are rounded in their bits, and a carry moves to the next exponent, or to infinity.
    bits = builder.bitcast(value, word)
    magnitude = builder.and_(bits, word(0x7FFFFFFF))
    subnormal = builder.bitcast(builder.fadd(builder.bitcast(magnitude, ir.FloatType()), ir.FloatType()(0.5)), word)
    odd = builder.and_(builder.lshr(magnitude, word(13)), word(1))
    rebased = builder.sub(builder.add(magnitude, word(0xFFF)), word(112 << 23))
    normal = builder.lshr(builder.add(rebased, odd), word(13))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, word(0x38800000)), builder.sub(subnormal, word(0x3F000000)), normal
    )
    result = builder.select(builder.icmp_unsigned(">=", magnitude, word(0x47800000)), word(0x7C00), result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, word(0x7F800000)), word(0x7E00), result)
    sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
    return builder.trunc(builder.or_(result, sign), half)


@intrinsic
def narrow(typingctx, value):  # type: ignore[no-untyped-def]
    """Bits (int16) of the fp16 number nearest to an fp32 number."""
    return types.int16(types.float32), lambda context, builder, signature, args: round_to_half(builder, args[0])


@intrinsic
def widen(typingctx, value):  # type: ignore[no-untyped-def]
    """A stored scalar as fp32: float32 as it is, uint16 as bf16, int16 as fp16."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if value == types.uint16:
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        if value == types.int16:
            return extend_half(builder, args[0])
        return args[0]

    return types.float32(value), codegen


@intrinsic
def size_of(typingctx, witness):  # type: ignore[no-untyped-def]
    """Bytes of one element of the witness's type."""
    return types.int64(witness), lambda context, builder, signature, args: ir.Constant(
        ir.IntType(64), context.get_abi_sizeof(context.get_value_type(witness))
    )


@intrinsic
def address_of(typingctx, array):  # type: ignore[no-untyped-def]
    """Address of an array's first element."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), codegen


@intrinsic(prefer_literal=True)
def reserve(typingctx, nbytes):  # type: ignore[no-untyped-def]
    """Address of a constant number of bytes on the calling function's stack, on a cache line of their own."""
    if not isinstance(nbytes, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        with builder.goto_entry_block():
            space = builder.alloca(ir.ArrayType(ir.IntType(8), nbytes.literal_value))
            space.align = 64
        return builder.ptrtoint(space, ir.IntType(64))

    return types.int64(nbytes), codegen


def _word(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def atomic_load(typingctx, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`, sequentially consistent."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_word(builder, args[0]), _ORDER, 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write an int64 to `address`, sequentially consistent."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[1], _word(builder, args[0]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Add to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):  # type: ignore[no-untyped-def]
    """Tell the processor that this is a waiting loop."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        instruction = _pause_instruction(builder.module.triple)
        if instruction is not None:
            name, arguments = instruction
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen


def _pause_instruction(triple: str) -> tuple[str, list[Any]] | None:
    if triple.startswith(("x86_64", "i686")):
        return "llvm.x86.sse2.pause", []
    if triple.startswith(("aarch64", "arm64")):
        return "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
    return None


@intrinsic
def call(typingctx, function, argument):  # type: ignore[no-untyped-def]
    """Call the C function ``void f(int64)`` at address `function`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _system_call(builder: ir.IRBuilder, number: int, arguments: list[ir.Value]) -> ir.Value:
    word = ir.IntType(64)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word], var_arg=True), "syscall")
    return builder.call(function, [ir.Constant(word, number), *arguments])


@intrinsic
def futex_wait(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Sleep until woken, unless the low 32 bits at `address` differ from those of `value`; may wake for no reason."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        zero = ir.Constant(ir.IntType(64), 0)
        wait = ir.Constant(ir.IntType(64), 128)  # FUTEX_WAIT | FUTEX_PRIVATE_FLAG
        low = builder.and_(args[1], ir.Constant(ir.IntType(64), 0xFFFFFFFF))
        _system_call(builder, FUTEX[platform.machine()], [args[0], wait, low, zero, zero, zero])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def futex_wake(typingctx, address):  # type: ignore[no-untyped-def]
    """Wake all threads that sleep at `address`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        zero = ir.Constant(ir.IntType(64), 0)
        wake = ir.Constant(ir.IntType(64), 129)  # FUTEX_WAKE | FUTEX_PRIVATE_FLAG
        everyone = ir.Constant(ir.IntType(64), 2**31 - 1)
        _system_call(builder, FUTEX[platform.machine()], [args[0], wake, everyone, zero, zero, zero])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def yield_processor(typingctx):  # type: ignore[no-untyped-def]
    """Let another thread run that waits for this processor."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = "SwitchToThread" if "windows" in builder.module.triple else "sched_yield"
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@helper
def wait_briefly(waited):  # type: ignore[no-untyped-def]
    """One step of waiting for a thread that is at work; it may have lost its processor, so sometimes give ours."""
    if waited % 256 == 255:
        yield_processor()
    else:
        pause()
    return waited + 1
