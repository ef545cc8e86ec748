"""Stored codes into fp32 lanes, in registers: a group of 32 codes becomes two vectors of sixteen numbers.

The witness of a code is a scalar whose type tells the code: int8 for int8, uint8 for int4 (0..15, without the zero
point), int16 for e4m3, uint16 for e2m1. Small floats are read as fp16 with their exponent in its place, which every
processor widens, subnormals included; what that leaves out of the number is a power of two, `unit_of`, to be multiplied
with the scale. With AVX-512, 4-bit codes are looked up in a register.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from moebius.kernels.encoding import E2M1
from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import helper, intrinsic
from moebius.kernels.numba.memory import extend_half, peek, widen
from moebius.kernels.numba.simd import LANES, f32x16, first_lanes, read, read_first

INT8_CODE, INT4_CODE, E4M3_CODE, E2M1_CODE = np.int8(0), np.uint8(0), np.int16(0), np.uint16(0)
FP32_SCALE, BF16_SCALE, FP16_SCALE, E8M0_SCALE = 0, 1, 2, 3  # kinds of scales
SCALE_KINDS = {"fp32": FP32_SCALE, "bf16": BF16_SCALE, "fp16": FP16_SCALE, "e8m0": E8M0_SCALE}

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_SHORTS, _INTS, _FLOATS = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _all(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def decode(typingctx, address, witness):  # type: ignore[no-untyped-def]
    """The numbers of the 32 codes of the group at `address`, without `unit_of`, zero point and scale."""
    emit = {types.int8: _int8, types.uint8: _int4, types.int16: _e4m3, types.uint16: _e2m1}[witness]

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.make_tuple(builder, signature.return_type, emit(builder, args[0]))

    return types.UniTuple(f32x16, 2)(types.int64, witness), codegen


def _int8(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    halves = _bytes(builder, address), _bytes(builder, builder.add(address, ir.IntType(64)(LANES)))
    return [builder.sitofp(builder.sext(half, _INTS), _FLOATS) for half in halves]


def _int4(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    if has_feature("avx512f"):
        return _looked_up(builder, address, list(range(LANES)))
    return [builder.sitofp(half, _FLOATS) for half in _nibbles(builder, address)]


def _e2m1(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    if has_feature("avx512f"):
        return _looked_up(builder, address, [*E2M1, *(-x for x in E2M1)])
    wide = builder.zext(_bytes(builder, address), _SHORTS)
    tops = (builder.shl(wide, _all(_SHORTS, shift)) for shift in (12, 8))
    lower = (builder.ashr(top, _all(_SHORTS, 3)) for top in tops)  # fp16's exponent is longer by so much
    return [extend_half(builder, builder.and_(bits, _all(_SHORTS, 0x8E00))) for bits in lower]


def _e4m3(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    words = ir.VectorType(_I16, 2 * LANES)
    wide = builder.sext(read(builder, address, _I8, words.count), words)
    bits = builder.and_(builder.shl(wide, _all(words, 7)), _all(words, 0xBF80))  # one of the two signs goes
    return [extend_half(builder, _cut(builder, bits, half)) for half in (0, LANES)]


def _cut(builder: ir.IRBuilder, value: ir.Value, first: int) -> ir.Value:
    return builder.shuffle_vector(value, value, ir.Constant(_INTS, list(range(first, first + LANES))))


def _bytes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, ir.VectorType(_I8, LANES).as_pointer()), align=1)


def _nibbles(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    wide = builder.zext(_bytes(builder, address), _INTS)
    return [builder.and_(wide, _all(_INTS, 15)), builder.lshr(wide, _all(_INTS, 4))]


def _looked_up(builder: ir.IRBuilder, address: ir.Value, table: list[float]) -> list[ir.Value]:
    wide = builder.zext(_bytes(builder, address), _INTS)
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    values = ir.Constant(_FLOATS, [float(value) for value in table])
    # the index is the lowest four bits of a lane; the others are ignored
    return [builder.call(permute, [values, index]) for index in (wide, builder.lshr(wide, _all(_INTS, 4)))]


def _constant(number: Any) -> Any:
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(context.get_value_type(signature.return_type), number)

    return codegen


@intrinsic
def unit_of(typingctx, witness):  # type: ignore[no-untyped-def]
    """What the numbers of `decode` have to be multiplied with (a constant)."""
    unit = {types.int16: 2.0**8, types.uint16: 1.0 if has_feature("avx512f") else 2.0**14}.get(witness, 1.0)
    return types.float32(witness), _constant(unit)


@intrinsic
def group_bytes(typingctx, witness):  # type: ignore[no-untyped-def]
    """Bytes of a group's codes (a constant)."""
    return types.int64(witness), _constant(16 if witness in (types.uint8, types.uint16) else 32)


@intrinsic
def has_zero_point(typingctx, witness):  # type: ignore[no-untyped-def]
    """Whether a zero point has to be taken from the numbers (a constant)."""
    return types.boolean(witness), _constant(int(witness == types.uint8))


@helper
def scale_at(scales, index, kind):  # type: ignore[no-untyped-def]
    """Scale `index` of those of a kind at address `scales`, fp32."""
    if kind == FP32_SCALE:
        return peek(scales + 4 * index, np.float32(0))
    if kind == E8M0_SCALE:
        exponent = np.int32(peek(scales + index, np.uint8(0)))
        return from_bits(exponent << 23 if exponent else np.int32(0x400000))
    if kind == BF16_SCALE:
        return widen(peek(scales + 2 * index, np.uint16(0)))
    return widen(peek(scales + 2 * index, np.int16(0)))


@intrinsic
def _exponents(typingctx, address):  # type: ignore[no-untyped-def]
    return f32x16(types.int64), lambda context, b, signature, args: _powers(b, read(b, args[0], _I8, LANES))


@intrinsic
def _first_exponents(typingctx, address, count):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        powers = _powers(builder, read_first(builder, args[0], args[1], _I8, LANES))
        return builder.select(first_lanes(builder, args[1], LANES), powers, _all(_FLOATS, 0.0))

    return f32x16(types.int64, types.int64), codegen


def _powers(builder: ir.IRBuilder, exponents: ir.Value) -> ir.Value:
    wide = builder.zext(exponents, _INTS)
    smallest = builder.icmp_unsigned("==", wide, _all(_INTS, 0))
    bits = builder.select(smallest, _all(_INTS, 0x400000), builder.shl(wide, _all(_INTS, 23)))
    return builder.bitcast(bits, _FLOATS)


@helper
def load_exponents(address, count):  # type: ignore[no-untyped-def]
    """Sixteen scales in e8m0, of which `count` exist; zeros behind them, where a code 0 would be a slow subnormal."""
    return _exponents(address) if count >= LANES else _first_exponents(address, count)


@intrinsic
def from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The fp32 number with these bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.trunc(args[0], _I32) if args[0].type != _I32 else args[0], _F32)

    return types.float32(bits), codegen
