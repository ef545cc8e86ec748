"""The register tile behind `panels`: a few rows of a panel times one or two registers of sixteen vectors each.

Every sum has a lane of its own, so nothing is added across lanes: a step takes one number of each row (a pair of bf16)
and multiplies it with that of sixteen vectors at once. A sum runs over its columns in ascending order whatever the
tile, so results do not depend on how many vectors there are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from moebius.kernels.numba.bfloats import multiply_add, rounded
from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import helper, intrinsic
from moebius.kernels.numba.simd import LANES, f32x16, prefetch

PANEL_ROWS = 16
PITCH = 2048 + 64  # bytes between the rows of a panel: no power of two, or all rows would share cache sets
LINE = 64
STEPS = 16  # steps in a line of a panel's row: pairs of bf16, or fp32 numbers
X_LINE = STEPS * LINE  # bytes of packed vectors beside a line
SUMS = PANEL_ROWS * LINE  # bytes of the sums of a panel and sixteen vectors: fp32 [row, vector]
_I32, _I64, _FLOATS = ir.IntType(32), ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I32, LANES)


def _rows(vectors: int) -> int:
    """Rows of a tile: sixteen sums in 32 registers of AVX-512, four (eight half registers of sixteen) elsewhere."""
    return (16 if has_feature("avx512f") else 4) // vectors


def _at(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), kind.as_pointer())


@intrinsic
def keep(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write a register of fp32 or bf16 as it is."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], _at(builder, args[0], 0, args[1].type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def keep_group(typingctx, address, first, second, vector):  # type: ignore[no-untyped-def]
    """Write 32 fp32 numbers as elements of the type that `vector` tells: fp32, or bf16 to which they are rounded."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if vector == types.float32:
            for half in (0, 1):
                builder.store(args[1 + half], _at(builder, args[0], LINE * half, _FLOATS), align=4)
        else:
            both = rounded(builder, args[1], args[2])
            builder.store(both, _at(builder, args[0], 0, both.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16, f32x16, vector), codegen


@intrinsic
def keep_rows(typingctx, address, even, odd, vector):  # type: ignore[no-untyped-def]
    """Write two successive columns of sixteen vectors in the packed order (see `panels`)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if vector == types.float32:
            for column in (0, 1):
                builder.store(args[1 + column], _at(builder, args[0], LINE * column, _FLOATS), align=4)
            return context.get_dummy_value()
        both = rounded(builder, args[1], args[2])
        lanes = [lane + half for lane in range(LANES) for half in (0, LANES)]
        pairs = builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes))
        builder.store(pairs, _at(builder, args[0], 0, pairs.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16, f32x16, vector), codegen


def make_tile(vectors: int) -> Any:
    """The product of a panel and `vectors` times sixteen vectors."""

    @intrinsic
    def rows(typingctx):  # type: ignore[no-untyped-def]
        return types.int64(), lambda context, builder, signature, args: ir.Constant(_I64, _rows(vectors))

    @intrinsic
    def nothing(typingctx):  # type: ignore[no-untyped-def]
        """Sums of nothing."""
        kind = types.UniTuple(f32x16, _rows(vectors) * vectors)
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        return kind(), lambda context, builder, signature, args: context.make_tuple(builder, kind, [zero] * kind.count)

    @intrinsic
    def put(typingctx, target, sums, fresh):  # type: ignore[no-untyped-def]
        """Write sums to `target`, or add them to what is there."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            for offset, value in zip(_places(vectors), cgutils.unpack_tuple(builder, args[1]), strict=True):
                place = _at(builder, args[0], offset, _FLOATS)
                before = builder.select(args[2], zero, builder.load(place, align=LINE))
                builder.store(builder.fadd(before, value), place, align=LINE)
            return context.get_dummy_value()

        return types.void(types.int64, sums, types.boolean), codegen

    @intrinsic
    def step(typingctx, sums, w, x, x_pitch, vector):  # type: ignore[no-untyped-def]
        """One number (pair) of each row of the tile times that of all vectors, added to the sums."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            result, (w, x, x_pitch) = cgutils.unpack_tuple(builder, args[0]), args[1:4]
            kind = _FLOATS if vector == types.float32 else _WORDS
            columns = []
            for number in range(vectors):
                place = builder.add(x, builder.mul(x_pitch, ir.Constant(_I64, number)))
                columns.append(builder.load(_at(builder, place, 0, kind), align=LINE))
            for row in range(_rows(vectors)):
                single = builder.load(_at(builder, w, PITCH * row, kind.element), align=4)
                lane = builder.insert_element(ir.Constant(kind, ir.Undefined), single, _I32(0))
                every = builder.shuffle_vector(lane, lane, ir.Constant(_WORDS, [0] * LANES))
                for number, column in enumerate(columns):
                    place = row * vectors + number
                    result[place] = multiply_add(builder, every, column, result[place])
            return context.make_tuple(builder, sums, result)

        return sums(sums, types.int64, types.int64, types.int64, vector), codegen

    @helper
    def tile(panel, x, x_pitch, lines, target, fresh, ahead, ask, vector):  # type: ignore[no-untyped-def]
        """Add (`fresh`: write) the products to fp32 [vectors, 16 rows, 16] at `target`.

        `lines` is the length of rows; the vectors' registers are `x_pitch` bytes apart; `ahead`, if any, is memory to
        ask for on the way, `ask` cache lines with each line.
        """
        for row in range(0, PANEL_ROWS, rows()):
            first, last = ask * row // PANEL_ROWS, ask * (row + rows()) // PANEL_ROWS
            sums = nothing()
            for line in range(lines):
                if ahead:
                    for index in range(ask * line + first, ask * line + last):
                        prefetch(ahead + LINE * index)
                w, y = panel + PITCH * row + LINE * line, x + X_LINE * line
                for number in range(STEPS):
                    sums = step(sums, w + 4 * number, y + LINE * number, x_pitch, vector)
            put(target + LINE * row, sums, fresh)

    return tile


def _places(vectors: int) -> list[int]:
    """Offsets of a tile's sums."""
    return [LINE * row + SUMS * number for row in range(_rows(vectors)) for number in range(vectors)]


tile_of_one, tile_of_two = make_tile(1), make_tile(2)
