"""The register tile behind `panels`: a few rows of a panel times up to sixteen vectors.

A line (64 bytes) of a panel's row or of a vector is four *pieces* of sixteen bytes. Packed vectors lie four by four:
64 bytes hold a piece of each of four vectors, which a step multiplies with the row's piece, repeated. So four vectors
cost a quarter of sixteen, and no lane is idle but for the last three vectors of an expert. Each product of a row and a
vector is four sums, of columns in ascending order, which are added at the end of the panel's row in one order: results
depend neither on how many vectors there are nor on a vector's place among them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from moebius.kernels.numba.bfloats import multiply_add, rounded
from moebius.kernels.numba.isa import has_feature, is_x86
from moebius.kernels.numba.jit import helper, helper_of, intrinsic
from moebius.kernels.numba.simd import LANES, f32x16, prefetch_later

PANEL_ROWS = 16
PITCH = 2048 + 64  # bytes between the rows of a panel: no power of two, or all rows would share cache sets
LINE = 64
STEPS = 4  # pieces of a line
X_LINE = 16 * LINE  # bytes of sixteen packed vectors beside a line
_FOUR = STEPS * LINE  # bytes of four of them
SUMS = PANEL_ROWS * LINE  # bytes of the sums of a panel and sixteen vectors: fp32 [row, vector]
_I32, _I64, _FLOATS = ir.IntType(32), ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I32, LANES)


def _rows(fours: int) -> int:
    """Rows of a tile: up to sixteen sums in 32 registers of AVX-512; four of two registers, or of four, elsewhere."""
    if _most() > 2:
        return {1: 16, 2: 8, 3: 4, 4: 4}[fours]
    sums = 4 if has_feature("avx2") or not is_x86() else 2
    return max(1, sums // fours)


def _most() -> int:
    """Fours of vectors in a tile: with more than two, few registers would be left for rows, which share the vectors."""
    return 4 if has_feature("avx512f") else 2


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


@intrinsic
def keep_pieces(typingctx, source, target, first, vector):  # type: ignore[no-untyped-def]
    """Write fp32 [four vectors, 16 columns] at `source` as the columns from `first` on of packed vectors."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target, first = args[:3]
        size = 4 if vector == types.float32 else 2
        line = builder.mul(builder.udiv(first, _I64(LINE // size)), _I64(X_LINE))
        step = builder.mul(builder.urem(builder.udiv(first, _I64(16 // size)), _I64(STEPS)), _I64(LINE))
        target = builder.add(target, builder.add(line, step))
        rows = [builder.load(_at(builder, source, LINE * row, _FLOATS), align=LINE) for row in range(4)]
        if size == 2:
            rows = [builder.bitcast(rounded(builder, *rows[row : row + 2]), _FLOATS) for row in (0, 2)]
        for number, value in enumerate(transposed_pieces(builder, rows)):
            builder.store(value, _at(builder, target, LINE * number, _FLOATS), align=LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, vector), codegen


@intrinsic
def transpose_pieces(typingctx, source, target):  # type: ignore[no-untyped-def]
    """Write the pieces of four lines at `source` to four lines at `target`, the first of each to the first line."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        rows = [builder.load(_at(builder, args[0], LINE * row, _FLOATS), align=LINE) for row in range(4)]
        for number, value in enumerate(transposed_pieces(builder, rows)):
            builder.store(value, _at(builder, args[1], LINE * number, _FLOATS), align=LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def transposed_pieces(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """From four registers, or two that each hold half of the pieces of two vectors: their pieces one after another."""

    def pick(a: ir.Value, b: ir.Value, pieces: list[int]) -> ir.Value:
        lanes = [4 * piece + lane for piece in pieces for lane in range(4)]
        return builder.shuffle_vector(a, b, ir.Constant(_WORDS, lanes))

    if len(rows) == 2:
        return [pick(rows[0], rows[1], [0, 2, 4, 6]), pick(rows[0], rows[1], [1, 3, 5, 7])]
    halves = [(pick(a, b, [0, 1, 4, 5]), pick(a, b, [2, 3, 6, 7])) for a, b in (rows[:2], rows[2:])]
    result = []
    for a, b in zip(*halves, strict=True):
        result += [pick(a, b, [0, 2, 4, 6]), pick(a, b, [1, 3, 5, 7])]
    return result


def _fold(builder: ir.IRBuilder, fours: list[ir.Value]) -> ir.Value:
    """The sums of each four lanes of up to four registers, one after another; zeros for registers that are missing."""
    a, b, c, d = [*fours, *[ir.Constant(_FLOATS, [0.0] * LANES)] * (4 - len(fours))]

    def add_halves(a: ir.Value, b: ir.Value, low: list[int], high: list[int]) -> ir.Value:  # within each four lanes
        lanes = [ir.Constant(_WORDS, [4 * four + lane for four in range(4) for lane in half]) for half in (low, high)]
        return builder.fadd(*(builder.shuffle_vector(a, b, half) for half in lanes))

    ab, cd = (add_halves(v, w, [0, 16, 1, 17], [2, 18, 3, 19]) for v, w in ((a, b), (c, d)))
    mixed = add_halves(ab, cd, [0, 1, 16, 17], [2, 3, 18, 19])  # [vector of a register, register]
    order = ir.Constant(_WORDS, [4 * (lane % 4) + lane // 4 for lane in range(LANES)])
    return builder.shuffle_vector(mixed, mixed, order)


def make_tile(fours: int) -> Any:
    """The product of a panel and `fours` times four vectors."""

    @intrinsic
    def rows(typingctx):  # type: ignore[no-untyped-def]
        return types.int64(), lambda context, builder, signature, args: ir.Constant(_I64, _rows(fours))

    @intrinsic
    def nothing(typingctx):  # type: ignore[no-untyped-def]
        """Sums of nothing."""
        kind = types.UniTuple(f32x16, _rows(fours) * fours)
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        return kind(), lambda context, builder, signature, args: context.make_tuple(builder, kind, [zero] * kind.count)

    @intrinsic
    def put(typingctx, target, sums, fresh):  # type: ignore[no-untyped-def]
        """Write sums to `target`, or add them to what is there."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind, values = ir.VectorType(ir.FloatType(), 4 * fours), cgutils.unpack_tuple(builder, args[1])
            lanes, zero = ir.Constant(ir.VectorType(_I32, kind.count), list(range(kind.count))), ir.Constant(kind, None)
            for row in range(_rows(fours)):
                place = _at(builder, args[0], LINE * row, kind)
                before = builder.select(args[2], zero, builder.load(place, align=16))
                value = _fold(builder, values[row * fours : (row + 1) * fours])
                builder.store(builder.fadd(before, builder.shuffle_vector(value, value, lanes)), place, align=16)
            return context.get_dummy_value()

        return types.void(types.int64, sums, types.boolean), codegen

    @intrinsic
    def step(typingctx, sums, w, pitch, x, vector):  # type: ignore[no-untyped-def]
        """A piece of each row of the tile, `pitch` bytes apart, times that of all vectors, added to the sums."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            result, (w, pitch, x) = cgutils.unpack_tuple(builder, args[0]), args[1:4]
            kind = _FLOATS if vector == types.float32 else _WORDS
            columns = [builder.load(_at(builder, x, _FOUR * four, kind), align=LINE) for four in range(fours)]
            for row in range(_rows(fours)):
                here = builder.add(w, builder.mul(pitch, _I64(row)))
                piece = builder.load(_at(builder, here, 0, ir.VectorType(kind.element, 4)), align=1)
                every = builder.shuffle_vector(piece, piece, ir.Constant(_WORDS, [lane % 4 for lane in range(LANES)]))
                for four, column in enumerate(columns):
                    place = row * fours + four
                    result[place] = multiply_add(builder, every, column, result[place])
            return context.make_tuple(builder, sums, result)

        return sums(sums, types.int64, types.int64, types.int64, vector), codegen

    @helper_of(f"{fours}")
    def tile(panel, pitch, x, lines, target, fresh, ahead, vector):  # type: ignore[no-untyped-def]
        address, count, turn, turns = ahead
        share = PANEL_ROWS * turns
        each = (count * rows() + share * lines - 1) // (share * lines)
        for row in range(0, PANEL_ROWS, rows()):
            done = PANEL_ROWS * turn + row
            asked, end = address + LINE * (count * done // share), address + LINE * (count * (done + rows()) // share)
            sums = nothing()
            for line in range(lines):
                stop = min(asked + LINE * each, end)
                while asked < stop:
                    prefetch_later(asked)
                    asked += LINE
                w, y = panel + pitch * row + LINE * line, x + X_LINE * line
                for number in range(STEPS):
                    sums = step(sums, w + 16 * number, pitch, y + LINE * number, vector)
            put(target + LINE * row, sums, fresh)

    return tile


_tile4, _tile8, _tile12, _tile16 = (make_tile(fours) for fours in (1, 2, 3, 4))


@intrinsic
def _splits(typingctx):  # type: ignore[no-untyped-def]
    """Whether no tile takes more than eight vectors (a constant)."""
    return types.boolean(), lambda context, builder, signature, args: ir.Constant(ir.IntType(1), _most() == 2)


@helper
def multiply_block(panel, pitch, x, count, lines, target, fresh, ahead, vector):  # type: ignore[no-untyped-def]
    """Add (`fresh`: write) the products of a panel and `count` of sixteen packed vectors to fp32 [16 rows, 16].

    Rows are `lines` long and `pitch` bytes apart. `ahead` is memory to ask for on the way, in ascending order as the
    processor's own prefetching likes it, its cache lines, and which of how many calls that share it this is. Of the
    products with vectors beyond the last four that have any nothing is written.
    """
    if _splits() and count > 8:
        address, asked, turn, turns = ahead
        _tile8(panel, pitch, x, lines, target, fresh, (address, asked, 2 * turn, 2 * turns), vector)
        x, target, count, ahead = x + 2 * _FOUR, target + 32, count - 8, (address, asked, 2 * turn + 1, 2 * turns)
    if count > 12:
        _tile16(panel, pitch, x, lines, target, fresh, ahead, vector)
    elif count > 8:
        _tile12(panel, pitch, x, lines, target, fresh, ahead, vector)
    elif count > 4:
        _tile8(panel, pitch, x, lines, target, fresh, ahead, vector)
    else:
        _tile4(panel, pitch, x, lines, target, fresh, ahead, vector)
