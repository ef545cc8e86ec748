"""Numbers in bf16 as vectors: thirty-two of them, their products in pairs, rounding to them.

With inputs in fp32 (witness float32) weights are widened; with inputs in bf16 (witness uint16) they are multiplied as
they are, in pairs: one instruction with AVX-512 BF16, which reads subnormals as zero.
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


def multiplies_pairs() -> bool:
    """Whether the processor has an instruction for pairs of bf16."""
    return has_feature("avx512bf16")


@intrinsic
def products_of(typingctx, wanted):  # type: ignore[no-untyped-def]
    """Witness of the type in which panels are multiplied, `wanted`, or fp32 where the processor has no such product."""
    paired = multiplies_pairs() and wanted == types.uint16
    kind = types.uint16 if paired else types.float32
    zero = ir.Constant(_I16, 0) if paired else ir.Constant(_F32, 0.0)
    return kind(wanted), lambda context, builder, signature, args: zero


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


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c of fp32 lanes; of pairs of bf16 (as int32), both products of each lane's pair."""
    if a.type == _FLOATS:
        return emit_fma(builder, a, b, c)
    pairs = ir.VectorType(_BFloat(), 32)
    kind = ir.FunctionType(_FLOATS, [_FLOATS, pairs, pairs])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [c, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])


def rounded(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """32 fp32 numbers rounded to bf16 (ties to even, subnormals to zero), as their bits; NaN stays NaN."""
    kind = ir.FunctionType(ir.VectorType(_BFloat(), 32), [_FLOATS, _FLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return builder.bitcast(builder.call(function, [second, first]), _NUMBERS)
