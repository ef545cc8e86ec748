"""Vectors of bytes and of integers beside the fp32 lanes of `simd`, for weights that are stored as codes.

Four-bit codes are multiplied as unsigned bytes with signed ones (VNNI, or multiply-add of pairs of bytes), the floats
among them looked up before; codes of eight bits as words of 16 with words, in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default

from moebius.kernels.encoding import E2M1 as NUMBERS
from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import intrinsic
from moebius.kernels.numba.simd import LANES, f32x16

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_BYTES, _INTS = ir.VectorType(_I8, 64), ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, 32)
_FLOATS = ir.VectorType(_F32, LANES)


class U8x64(types.Type):
    """Sixty-four bytes, one cache line; or as many bits as words of 16."""

    def __init__(self) -> None:
        super().__init__(name="u8x64")


class I32x16(types.Type):
    """Sixteen int32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="i32x16")


u8x64, i32x16 = U8x64(), I32x16()


@register_default(U8x64)
class _U8x64Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BYTES)


@register_default(I32x16)
class _I32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _INTS)


def _all(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _define(result: Any, arguments: tuple[Any, ...], emit: Callable[..., ir.Value | None]) -> Any:
    """Signature and code of an intrinsic from a function of (builder, *values)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value = emit(builder, *args)
        return context.get_dummy_value() if value is None else value

    return result(*arguments), codegen


@intrinsic
def load_bytes(typingctx, address):  # type: ignore[no-untyped-def]
    """The 64 bytes at `address`."""
    return _define(u8x64, (types.int64,), lambda b, address: _load(b, address, _BYTES))


@intrinsic
def load_ints(typingctx, address):  # type: ignore[no-untyped-def]
    """Sixteen int32 at `address`."""
    return _define(i32x16, (types.int64,), lambda b, address: _load(b, address, _INTS, 4))


@intrinsic
def no_ints(typingctx):  # type: ignore[no-untyped-def]
    """Sixteen zeros."""
    return _define(i32x16, (), lambda b: _all(_INTS, 0))


@intrinsic
def add_ints(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a + b."""
    return _define(i32x16, (i32x16, i32x16), lambda builder, a, b: builder.add(a, b))


@intrinsic
def floats(typingctx, a):  # type: ignore[no-untyped-def]
    """The integers as fp32."""
    return _define(f32x16, (i32x16,), lambda builder, a: builder.sitofp(a, _FLOATS))


@intrinsic
def integers(typingctx, a):  # type: ignore[no-untyped-def]
    """The integral part of numbers within the range of int32; 0 for NaN."""

    def emit(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:  # converting NaN would be undefined
        number = builder.fcmp_ordered("ord", a, a)
        return builder.fptosi(builder.select(number, a, ir.Constant(_FLOATS, [0.0] * LANES)), _INTS)

    return _define(i32x16, (f32x16,), emit)


@intrinsic
def sum_ints(typingctx, a):  # type: ignore[no-untyped-def]
    """Sum of the sixteen."""
    return _define(types.int32, (i32x16,), lambda b, a: _call(b, "llvm.vector.reduce.add.v16i32", _I32, a))


@intrinsic
def largest_magnitude(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The largest magnitude of 32 numbers; NaN if there is one (its bits, as an integer, exceed all others)."""

    def emit(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        magnitude = _all(_INTS, 0x7FFFFFFF)
        a, b = (builder.and_(builder.bitcast(v, _INTS), magnitude) for v in (a, b))
        larger = builder.select(builder.icmp_signed(">", a, b), a, b)
        return builder.bitcast(_call(builder, "llvm.vector.reduce.smax.v16i32", _I32, larger), _F32)

    return _define(types.float32, (f32x16, f32x16), emit)


@intrinsic
def store_low_bytes(typingctx, address, a):  # type: ignore[no-untyped-def]
    """Write the lowest byte of each of sixteen integers to `address`."""

    def emit(builder: ir.IRBuilder, address: ir.Value, a: ir.Value) -> None:
        kind = ir.VectorType(_I8, LANES)
        builder.store(builder.trunc(a, kind), builder.inttoptr(address, kind.as_pointer()), align=1)

    return _define(types.void, (types.int64, i32x16), emit)


@intrinsic
def halves_of_bytes(typingctx, low, high):  # type: ignore[no-untyped-def]
    """Bytes with low + 8 in the lower and high + 8 in the upper four bits, of integers in -8..7."""

    def emit(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
        low, high = (builder.add(v, _all(_INTS, 8)) for v in (low, high))
        return builder.or_(low, builder.shl(high, _all(_INTS, 4)))

    return _define(i32x16, (i32x16, i32x16), emit)


@intrinsic
def first_equal(typingctx, magnitude, value):  # type: ignore[no-untyped-def]
    """The first of sixteen lanes whose magnitude is `magnitude`; 16 if there is none."""

    def emit(builder: ir.IRBuilder, magnitude: ir.Value, value: ir.Value) -> ir.Value:
        single = builder.insert_element(ir.Constant(_INTS, ir.Undefined), builder.bitcast(magnitude, _I32), _I32(0))
        bits = builder.and_(builder.bitcast(value, _INTS), _all(_INTS, 0x7FFFFFFF))
        equal = builder.icmp_signed("==", bits, _shuffle(builder, single, single, [0] * LANES))
        mask = builder.zext(builder.bitcast(equal, _I16), _I32)
        mask = builder.or_(mask, _I32(1 << LANES))
        return builder.zext(builder.cttz(mask, ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return _define(types.int64, (types.float32, f32x16), emit)


@intrinsic
def store_words(typingctx, address, a, odd):  # type: ignore[no-untyped-def]
    """Write sixteen integers as int16: numbers 0, 2 .. 14 to `address`, 1, 3 .. 15 `odd` bytes behind."""

    def emit(builder: ir.IRBuilder, address: ir.Value, a: ir.Value, odd: ir.Value) -> None:
        kind = ir.VectorType(_I16, LANES // 2)
        for first, place in enumerate((address, builder.add(address, odd))):
            words = builder.trunc(_shuffle(builder, a, a, list(range(first, LANES, 2))), kind)
            builder.store(words, builder.inttoptr(place, kind.as_pointer()), align=2)

    return _define(types.void, (types.int64, i32x16, types.int64), emit)


@intrinsic
def times_256(typingctx, a):  # type: ignore[no-untyped-def]
    """256 a."""
    return _define(i32x16, (i32x16,), lambda builder, a: builder.shl(a, _all(_INTS, 8)))


@intrinsic
def second_byte(typingctx, a):  # type: ignore[no-untyped-def]
    """What the second byte must be for ``256 * second + first``, both signed, to give a."""

    def emit(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
        return builder.ashr(builder.add(a, _all(_INTS, 128)), _all(_INTS, 8))

    return _define(i32x16, (i32x16,), emit)


@intrinsic
def low_halves(typingctx, codes, element):  # type: ignore[no-untyped-def]
    """The lower four bits of each byte, as unsigned numbers: those of `offset_of` more than what they mean."""
    return _define(u8x64, (u8x64, element), lambda b, codes, _: _unsigned(b, b.and_(codes, _all(_BYTES, 15)), element))


@intrinsic
def high_halves(typingctx, codes, element):  # type: ignore[no-untyped-def]
    """The upper four bits of each byte, as `low_halves`."""
    return _define(u8x64, (u8x64, element), lambda b, codes, _: _unsigned(b, b.lshr(codes, _all(_BYTES, 4)), element))


def _unsigned(builder: ir.IRBuilder, codes: ir.Value, element: types.Type) -> ir.Value:
    if element == types.uint8:
        return codes
    if has_feature("avx2"):
        names = "llvm.x86.avx512.pshuf.b.512", "llvm.x86.avx2.pshuf.b"
        twice = [int(2 * number) for number in NUMBERS]
        table = ir.Constant(_BYTES, [12 + value for value in (*twice, *(-value for value in twice))] * 4)
        return _in_registers(builder, names, _BYTES, table, codes)
    # Twice the numbers of codes m = 0..7: m, 1 more for each step from 5 on, and 2 more at 7.
    magnitude = builder.and_(codes, _all(_BYTES, 7))
    above4, above6 = (_call(builder, "llvm.usub.sat.v64i8", _BYTES, magnitude, _all(_BYTES, n)) for n in (4, 6))
    twice = builder.add(builder.add(magnitude, above4), builder.add(above6, above6))
    negative = builder.icmp_unsigned(">", codes, _all(_BYTES, 7))
    return builder.add(builder.select(negative, builder.neg(twice), twice), _all(_BYTES, 12))


@intrinsic
def offset_of(typingctx, element):  # type: ignore[no-untyped-def]
    """What is added to the numbers of four-bit codes, twice those of e2m1, before they are multiplied (a constant)."""
    number = 12 if element == types.uint16 else 8
    return _define(types.int64, (element,), lambda b, _: ir.Constant(ir.IntType(64), number))


@intrinsic
def dot_bytes(typingctx, total, low, high, x, y):  # type: ignore[no-untyped-def]
    """total + unsigned bytes `low` (0..24) times signed bytes `x` + `high` times `y`, summed by fours."""

    def emit(builder: ir.IRBuilder, total: ir.Value, *bytes: ir.Value) -> ir.Value:
        products = list(zip(bytes[:2], bytes[2:], strict=True))
        if has_feature("avx512vnni") or has_feature("avxvnni"):
            for pair in products:
                total = _vnni(builder, total, *pair)
            return total
        if has_feature("avx2"):
            names = "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx2.pmadd.ub.sw"
            sums = [_in_registers(builder, names, _SHORTS, *pair) for pair in products]
            return builder.add(total, _pairs(builder, builder.add(*sums), _all(_SHORTS, 1)))
        return builder.add(total, builder.add(*(_dot_portably(builder, *pair) for pair in products)))

    return _define(i32x16, (i32x16, u8x64, u8x64, u8x64, u8x64), emit)


def _vnni(builder: ir.IRBuilder, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    names = "llvm.x86.avx512.vpdpbusd.512", "llvm.x86.avx512.vpdpbusd.256"
    return _in_registers(builder, names, _INTS, total, unsigned, signed)


def _in_registers(builder: ir.IRBuilder, names: tuple[str, str], result: ir.VectorType, *args: ir.Value) -> ir.Value:
    """Call the instruction for registers of 512 bits, or twice that for 256."""
    if has_feature("avx512bw"):
        return _call(builder, names[0], result, *args)
    half = ir.VectorType(result.element, result.count // 2)

    def part(number: int) -> ir.Value:
        lanes = [list(range(number * n // 2, (number + 1) * n // 2)) for n in (arg.type.count for arg in args)]
        cut = (_shuffle(builder, arg, arg, own) for arg, own in zip(args, lanes, strict=True))
        return _call(builder, names[1], half, *cut)

    return _shuffle(builder, part(0), part(1), list(range(result.count)))


def _dot_portably(builder: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    u, s, eight = builder.bitcast(unsigned, _SHORTS), builder.bitcast(signed, _SHORTS), _all(_SHORTS, 8)
    even = builder.and_(u, _all(_SHORTS, 255)), builder.ashr(builder.shl(s, eight), eight)
    odd = builder.lshr(u, eight), builder.ashr(s, eight)
    return builder.add(*(_pairs(builder, a, b) for a, b in (even, odd)))


@intrinsic
def dot_words(typingctx, a, b):  # type: ignore[no-untyped-def]
    """Sums of two products of 16-bit words, in each of sixteen lanes."""

    def emit(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        return _pairs(builder, builder.bitcast(a, _SHORTS), builder.bitcast(b, _SHORTS))

    return _define(i32x16, (u8x64, u8x64), emit)


@intrinsic
def low_words(typingctx, codes):  # type: ignore[no-untyped-def]
    """256 times the lower of each two signed bytes, as words."""

    def emit(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
        return builder.bitcast(builder.shl(builder.bitcast(codes, _SHORTS), _all(_SHORTS, 8)), _BYTES)

    return _define(u8x64, (u8x64,), emit)


@intrinsic
def high_words(typingctx, codes):  # type: ignore[no-untyped-def]
    """256 times the upper of each two signed bytes, as words."""

    def emit(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
        return builder.and_(codes, ir.Constant(_BYTES, [0, 255] * 32))

    return _define(u8x64, (u8x64,), emit)


@intrinsic
def planes(typingctx, element):  # type: ignore[no-untyped-def]
    """Bytes of an activation: one beside int4, two beside e2m1; 0 beside int8, where it is a word (a constant)."""
    number = {types.int8: 0, types.uint8: 1, types.uint16: 2}[element]
    return _define(types.int64, (element,), lambda b, _: ir.Constant(ir.IntType(64), number))


def _pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Sums of two products of int16."""
    if has_feature("avx2"):  # named, since LLVM finds it in the operations below only where it need not look far
        names = "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx2.pmadd.wd"
        return _in_registers(builder, names, _INTS, a, b)
    products = []
    for first in (0, 1):
        lanes = list(range(first, 32, 2))
        wide = [builder.sext(_shuffle(builder, v, v, lanes), _INTS) for v in (a, b)]
        products.append(builder.mul(*wide))
    return builder.add(*products)


@intrinsic(prefer_literal=True)
def spread(typingctx, scales, line, element):  # type: ignore[no-untyped-def]
    """Of the scales of sixteen groups, those of the groups in a line (64 bytes) of codes, each on its group's lanes.

    `line` is a constant from 0 to 3. int8 codes: two groups on eight lanes each; four-bit codes: four on four.
    """
    if not isinstance(line, types.IntegerLiteral):
        return None
    groups = 2 if element == types.int8 else 4
    lanes = [groups * line.literal_value + lane * groups // LANES for lane in range(LANES)]
    return f32x16(f32x16, line, element), lambda context, b, signature, args: _shuffle(b, args[0], args[0], lanes)


@intrinsic
def second_eight(typingctx, a):  # type: ignore[no-untyped-def]
    """The last eight numbers, then the first."""
    lanes = [*range(8, LANES), *range(8)]
    return _define(f32x16, (f32x16,), lambda builder, a: _shuffle(builder, a, a, lanes))


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Sixteen vectors of sixteen 32-bit numbers, transposed in four steps that every instruction set has."""

    def interleave(a: ir.Value, b: ir.Value, width: int) -> list[ir.Value]:  # within each four numbers
        halves = []
        for upper in (0, 2):
            pick = [[upper, 16 + upper, upper + 1, 17 + upper], [upper, upper + 1, 16 + upper, 17 + upper]][width - 1]
            halves.append(_shuffle(builder, a, b, [lane + 4 * four for four in range(4) for lane in pick]))
        return halves

    def fours(a: ir.Value, b: ir.Value, pick: list[int]) -> ir.Value:  # whole fours of both
        return _shuffle(builder, a, b, [4 * four + lane for four in pick for lane in range(4)])

    result: list[ir.Value] = [None] * 16
    mixed = []  # mixed[q][j]: numbers j, 4 + j, 8 + j, 12 + j of rows 4 q ... 4 q + 3
    for q in range(0, 16, 4):
        low, high = interleave(rows[q], rows[q + 1], 1)
        low2, high2 = interleave(rows[q + 2], rows[q + 3], 1)
        mixed.append([*interleave(low, low2, 2), *interleave(high, high2, 2)])
    for j in range(4):
        a, b, c, d = (mixed[q][j] for q in range(4))
        for half in (0, 2):
            ab, cd = (fours(v, w, [half, half + 1, 4 + half, 5 + half]) for v, w in ((a, b), (c, d)))
            result[4 * half + j] = fours(ab, cd, [0, 2, 4, 6])
            result[4 * half + 4 + j] = fours(ab, cd, [1, 3, 5, 7])
    return result


@intrinsic
def transpose_floats(typingctx, source, target, leap):  # type: ignore[no-untyped-def]
    """Write the columns of the fp32 [16, 16] at `source` to `target`, `leap` bytes apart."""

    def emit(builder: ir.IRBuilder, source: ir.Value, target: ir.Value, leap: ir.Value) -> None:
        number = [ir.Constant(ir.IntType(64), row) for row in range(LANES)]
        rows = [_load(builder, builder.add(source, ir.Constant(ir.IntType(64), 64 * i)), _INTS, 64) for i in range(16)]
        for i, column in enumerate(_transposed(builder, rows)):
            place = builder.inttoptr(builder.add(target, builder.mul(leap, number[i])), _INTS.as_pointer())
            builder.store(column, place, align=64)

    return _define(types.void, (types.int64,) * 3, emit)


INT8, INT4 = np.int8(0), np.uint8(0)  # witnesses of the codes
