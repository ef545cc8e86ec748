"""Sixteen fp32 lanes as a Numba type, so that kernels read like their formula and LLVM never has to guess.

The type is a generic LLVM vector: one register with AVX-512, two with AVX2, four on Arm. Everything here takes plain
addresses (int64); the element type of memory is told by a witness, a scalar whose value is ignored: float32 for fp32,
uint16 for bf16, int16 for fp16 (Numba has neither on the CPU, so they travel as their bits).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default

from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import helper, intrinsic
from moebius.kernels.numba.memory import extend_half

LANES = 16
_PAGE = 4096  # bytes; processors with larger pages have a multiple of it
_I1, _I8, _I16, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_V32 = ir.VectorType(_F32, LANES)


class F32x16(types.Type):
    """Sixteen fp32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_default(F32x16)
class _F32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _V32)


def _lanes(value: int | float, element: ir.Type) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _memory_type(witness: types.Type) -> ir.Type:
    return {types.float32: _F32, types.uint16: _I16, types.int16: _I16}[witness]  # type: ignore[index]


def widened(builder: ir.IRBuilder, load: Callable[[ir.Type], ir.Value], witness: types.Type) -> ir.Value:
    """What `load` reads as elements of the type that LLVM has for the witness, as fp32."""
    return _widen(builder, load(_memory_type(witness)), witness)


def _widen(builder: ir.IRBuilder, value: ir.Value, witness: types.Type) -> ir.Value:
    """Sixteen stored elements to fp32, exactly."""
    if witness == types.uint16:  # bf16 is the upper half of fp32
        wide = builder.shl(builder.zext(value, ir.VectorType(_I32, LANES)), _lanes(16, _I32))
        return builder.bitcast(wide, _V32)
    return value if witness == types.float32 else extend_half(builder, value)


@intrinsic
def load(typingctx, address, witness):  # type: ignore[no-untyped-def]
    """Sixteen consecutive elements at `address`, as fp32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return widened(builder, lambda memory: read(builder, args[0], memory, LANES), witness)

    return f32x16(types.int64, witness), codegen


def read(builder: ir.IRBuilder, address: ir.Value, memory: ir.Type, lanes: int) -> ir.Value:
    pointer = builder.inttoptr(address, ir.VectorType(memory, lanes).as_pointer())
    return builder.load(pointer, align=1)  # weights in a file may be anywhere


@intrinsic
def load_first(typingctx, address, count, witness):  # type: ignore[no-untyped-def]
    """The first `count` (1..15) elements at `address` as fp32, zeros in the other lanes; reads no page beyond."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return widened(builder, lambda memory: read_first(builder, args[0], args[1], memory, LANES), witness)

    return f32x16(types.int64, types.int64, witness), codegen


def read_first(builder: ir.IRBuilder, address: ir.Value, count: ir.Value, memory: ir.Type, lanes: int) -> ir.Value:
    """`count` elements, then zeros.

    Without AVX-512 a masked load of narrow elements is sixteen branches; a whole one that stays in its page is as safe.
    """
    vector, mask = ir.VectorType(memory, lanes), first_lanes(builder, count, lanes)
    if memory == _F32 or has_feature("avx512bw"):
        return _masked(builder, address, mask, vector)
    place, nothing = builder.and_(address, _I64(_PAGE - 1)), ir.Constant(vector, None)
    stays = builder.icmp_unsigned("<=", place, _I64(_PAGE - lanes * memory.width // 8))
    with builder.if_else(stays, likely=True) as (inside, across):
        with inside:
            whole, one = builder.select(mask, read(builder, address, memory, lanes), nothing), builder.block
        with across:
            partial, other = _masked(builder, address, mask, vector), builder.block
    result = builder.phi(vector)
    result.add_incoming(whole, one)
    result.add_incoming(partial, other)
    return result


def _masked(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value, vector: ir.VectorType) -> ir.Value:
    memory = vector.element
    name = f"llvm.masked.load.v{vector.count}{ {_F32: 'f32', _I16: 'i16', _I8: 'i8'}[memory] }.p0"
    kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, mask.type, vector])
    masked = cgutils.get_or_insert_function(builder.module, kind, name)
    pointer, align = builder.inttoptr(address, vector.as_pointer()), ir.Constant(_I32, 1)
    return builder.call(masked, [pointer, align, mask, ir.Constant(vector, None)])


def first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """Mask of the first `count` lanes."""
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    single = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), builder.trunc(count, _I32), _I32(0))
    every = builder.shuffle_vector(single, single, ir.Constant(numbers.type, [0] * lanes))
    return builder.icmp_signed("<", numbers, every)


@intrinsic
def store(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write sixteen fp32 numbers to `address`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], builder.inttoptr(args[0], _V32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), codegen


@intrinsic
def zeros(typingctx):  # type: ignore[no-untyped-def]
    """Sixteen zeros."""
    return f32x16(), lambda context, builder, signature, args: _lanes(0.0, _F32)


@intrinsic
def add(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a + b."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, fused where the processor can (llvm.fma would call a slow library function elsewhere)."""

    return f32x16(f32x16, f32x16, f32x16), lambda context, builder, signature, args: emit_fma(builder, *args)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_V32, [_V32] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), [a, b, c])


@intrinsic
def total(typingctx, value):  # type: ignore[no-untyped-def]
    """Sum of the sixteen lanes, by halving: a fixed order."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            upper = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
            lower = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
            value = builder.fadd(
                builder.shuffle_vector(value, value, lower), builder.shuffle_vector(value, value, upper)
            )
        return builder.extract_element(value, _I32(0))

    return types.float32(f32x16), codegen


def _prefetch(builder: ir.IRBuilder, address: ir.Value, locality: int) -> None:
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, _I32(0), _I32(locality), _I32(1)])  # read, data


@intrinsic
def prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `address`, which need not be readable."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _prefetch(builder, args[0], 3)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def prefetch_later(typingctx, address):  # type: ignore[no-untyped-def]
    """As `prefetch`, into the second-level cache, for what would displace in the first what is needed before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _prefetch(builder, args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def splat(typingctx, value):  # type: ignore[no-untyped-def]
    """Sixteen times one fp32 number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        single = builder.insert_element(ir.Constant(_V32, ir.Undefined), args[0], _I32(0))
        return builder.shuffle_vector(single, single, _lanes(0, _I32))

    return f32x16(types.float32), codegen


@intrinsic
def sub(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a - b."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def mul(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a * b."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def div(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a / b."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.fdiv(*args)


@intrinsic
def at_most(typingctx, a, limit):  # type: ignore[no-untyped-def]
    """The smaller of two, where NaN in `a` stays NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered(">", *args), args[1], args[0])

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def at_least(typingctx, a, limit):  # type: ignore[no-untyped-def]
    """The larger of two, where NaN in `a` stays NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def where_below(typingctx, a, limit, below, beyond):  # type: ignore[no-untyped-def]
    """`below` in the lanes where a < limit, `beyond` in the others and where a is NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen


@intrinsic
def magnitude(typingctx, value):  # type: ignore[no-untyped-def]
    """|value|."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        integers = ir.VectorType(_I32, LANES)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], integers), _lanes(0x7FFFFFFF, _I32)), _V32)

    return f32x16(f32x16), codegen


@intrinsic
def nearest(typingctx, value):  # type: ignore[no-untyped-def]
    """Rounded to the nearest integers, still fp32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_V32, [_V32])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.v16f32"), args)

    return f32x16(f32x16), codegen


@intrinsic
def power_of_two(typingctx, exponent):  # type: ignore[no-untyped-def]
    """2 ** exponent for integers from -126 to 127; anything for NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        integers = ir.VectorType(_I32, LANES)
        number = builder.fcmp_ordered("ord", args[0], args[0])  # converting NaN would be undefined
        exponent = builder.fptosi(builder.select(number, args[0], _lanes(0.0, _F32)), integers)
        return builder.bitcast(builder.shl(builder.add(exponent, _lanes(127, _I32)), _lanes(23, _I32)), _V32)

    return f32x16(f32x16), codegen


_LOG2_E, _HALF = np.float32(math.log2(math.e)), np.float32(0.5)
# ln 2 in two parts: the first has zeros at the end, so that its product with an exponent is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C2, _C3, _C4 = np.float32(0.49999994), np.float32(0.1666652), np.float32(0.041668393)
_C5, _C6 = np.float32(0.008368781), np.float32(0.0013814467)
_ONE, _HIGHEST, _LOWEST = np.float32(1), np.float32(100), np.float32(-110)  # beyond: infinity, zero


@helper
def exp(x):  # type: ignore[no-untyped-def]
    """e ** x to 2 ulp, with infinity, zero, subnormals and NaN where they belong.

    Range reduction to |r| <= ln(2) / 2, then a polynomial of relative error 5e-9 (minimax fit).
    """
    x = at_least(at_most(x, splat(_HIGHEST)), splat(_LOWEST))
    n = nearest(mul(x, splat(_LOG2_E)))
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))
    p = fma(splat(_C6), r, splat(_C5))
    p = fma(fma(fma(p, r, splat(_C4)), r, splat(_C3)), r, splat(_C2))
    p = fma(mul(p, r), r, add(r, splat(_ONE)))
    half = nearest(mul(n, splat(_HALF)))  # two factors, since 2 ** n itself leaves the range of exponents
    return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)))
