"""Thirty-two bf16 numbers as a vector, and the loads and products that tiles use with either kind of vector.

With inputs in fp32 (witness float32) a tile widens sixteen weights at a time; with inputs in bf16 (witness uint16) it
multiplies thirty-two weights as they are, in pairs: one instruction with AVX-512 BF16, which reads subnormals as zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default

from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import intrinsic
from moebius.kernels.numba.simd import LANES, emit_fma, f32x16, read, read_first, widened

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_NUMBERS, _INTS, _FLOATS = ir.VectorType(_I16, 32), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


class BF16x32(types.Type):
    """Thirty-two bf16 numbers, as their bits."""

    def __init__(self) -> None:
        super().__init__(name="bf16x32")


bf16x32 = BF16x32()


@register_default(BF16x32)
class _BF16x32Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _NUMBERS)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def multiplies_pairs(typingctx):  # type: ignore[no-untyped-def]
    """Whether the processor has an instruction for pairs of bf16 (a constant)."""
    return types.boolean(), lambda context, builder, signature, args: ir.Constant(
        ir.IntType(1), int(has_feature("avx512bf16"))
    )


@intrinsic
def is_bf16(typingctx, element):  # type: ignore[no-untyped-def]
    """Whether weights are bf16 (a constant)."""
    return types.boolean(element), lambda context, builder, signature, args: ir.Constant(
        ir.IntType(1), int(element == types.uint16)
    )


@intrinsic
def width_of(typingctx, vector):  # type: ignore[no-untyped-def]
    """Elements of a vector beside inputs of the type that `vector` tells."""
    return types.int64(vector), lambda context, builder, signature, args: ir.Constant(
        ir.IntType(64), 2 * LANES if vector == types.uint16 else LANES
    )


@intrinsic
def take(typingctx, address, element, vector):  # type: ignore[no-untyped-def]
    """Elements of type `element` at `address`, ready to be multiplied beside inputs of type `vector`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if vector == types.uint16:
            return read(builder, args[0], _I16, 2 * LANES)
        return widened(builder, lambda memory: read(builder, args[0], memory, LANES), element)

    return (bf16x32 if vector == types.uint16 else f32x16)(types.int64, element, vector), codegen


@intrinsic
def take_first(typingctx, address, count, element, vector):  # type: ignore[no-untyped-def]
    """As `take`, but only the first `count` elements, which are fewer than a vector; zeros in the other lanes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if vector == types.uint16:
            return read_first(builder, args[0], args[1], _I16, 2 * LANES)
        return widened(builder, lambda memory: read_first(builder, args[0], args[1], memory, LANES), element)

    return (bf16x32 if vector == types.uint16 else f32x16)(types.int64, types.int64, element, vector), codegen


@intrinsic
def accumulate(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c; of bf16 numbers, both products of each of sixteen pairs."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if a == f32x16:
            return emit_fma(builder, *args)
        if not has_feature("avx512bf16"):
            return _accumulate_portably(builder, *args)
        pairs = ir.VectorType(_BFloat(), 32)
        kind = ir.FunctionType(_FLOATS, [_FLOATS, pairs, pairs])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(function, [args[2], *(builder.bitcast(value, pairs) for value in args[:2])])

    return f32x16(a, b, f32x16), codegen


def _accumulate_portably(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    a, b = (builder.bitcast(value, _INTS) for value in (a, b))
    sixteen, upper = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [0xFFFF0000] * LANES)
    a0, b0 = (builder.bitcast(builder.shl(value, sixteen), _FLOATS) for value in (a, b))
    a1, b1 = (builder.bitcast(builder.and_(value, upper), _FLOATS) for value in (a, b))
    return emit_fma(builder, a1, b1, emit_fma(builder, a0, b0, c))


@intrinsic
def store_bf16(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write sixteen fp32 numbers to `address`, rounded to bf16 (ties to even); NaN stays NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def every(number: int) -> ir.Constant:
            return ir.Constant(_INTS, [number] * LANES)

        bits = builder.bitcast(args[1], _INTS)
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        rounded = builder.add(builder.add(bits, every(0x7FFF)), odd)
        quiet = builder.or_(bits, every(0x400000))
        rounded = builder.select(builder.fcmp_unordered("uno", args[1], args[1]), quiet, rounded)
        half = builder.trunc(builder.lshr(rounded, every(16)), ir.VectorType(_I16, LANES))
        builder.store(half, builder.inttoptr(args[0], half.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), codegen
