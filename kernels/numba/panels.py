"""Experts with many pairs: blocks of sixteen rows times all of an expert's vectors, in the register tiles of `outer`.

Weights are unpacked into a *panel*: sixteen rows of up to 2048 bytes of fp32 or bf16, zeros beyond the end of a row.
Those that are stored in the type of the products, in rows that need no zeros, are multiplied where they lie. Vectors
are *packed* by sixteen pairs, in pieces (see `outer`; for AMX see `outer_tiles`), zeros beyond the last column, which
is a multiple of 32. Products are in bf16 where weights are no finer, the caller's inputs are bf16 and the processor
multiplies it; in fp32 elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.bfloats import take, take_first, width_of
from moebius.kernels.numba.integers import transpose_floats
from moebius.kernels.numba.jit import helper, helper_of
from moebius.kernels.numba.memory import reserve, size_of
from moebius.kernels.numba.outer import (
    LINE,
    PANEL_ROWS,
    PITCH,
    SUMS,
    X_LINE,
    keep,
    keep_pieces,
    keep_rows,
    multiply_block,
    transpose_pieces,
)
from moebius.kernels.numba.outer_tiles import multiply_tiles, packs_by_sixteen
from moebius.kernels.numba.simd import LANES, load, prefetch, prefetch_later, splat, store, zeros
from moebius.kernels.numba.units import (
    ROWS,
    add_output,
    bias_at,
    combine,
    entry_of,
    has_many,
    inner_of,
    packed_of,
    part,
    slot_of,
    word,
)

PADDING = 32  # columns of packed vectors come in multiples of it
_PANEL_BYTES = PANEL_ROWS * PITCH
_BATCH = 128  # pairs that an unpacked panel serves: unpacking costs a tenth of the products of sixteen
_SUMS = SUMS * _BATCH // LANES
_STAGE = LANES * LINE
_F32 = np.float32(0)


def packed_bytes(n: int, size: int) -> int:
    """Bytes of a packed vector of n elements of `size` bytes."""
    return -(-n // PADDING) * PADDING * size


@helper
def _padded(n):  # type: ignore[no-untyped-def]
    return (n + PADDING - 1) // PADDING * PADDING


@helper
def _columns(vector):  # type: ignore[no-untyped-def]
    """Columns of a panel: few in fp32, whose sums of products would lose digits in one long row of additions."""
    return 1024 if width_of(vector) > LANES else 256


@helper
def pack_inputs(job, layer, active, vector):  # type: ignore[no-untyped-def]
    """Pack the inputs of all pairs of an expert, if it has many."""
    if not has_many(job, active):
        return
    kind = word(job, words.SOURCE_KIND)
    if kind == 0:
        _pack_inputs(job, layer, active, _F32, vector)
    elif kind == 1:
        _pack_inputs(job, layer, active, np.uint16(0), vector)
    else:
        _pack_inputs(job, layer, active, np.int16(0), vector)


@helper
def _pack_inputs(job, layer, active, element, vector):  # type: ignore[no-untyped-def]
    n, width, stage = word(layer, words.HIDDEN), width_of(vector), reserve(_STAGE)
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    for pair in range(begin, end, LANES):
        target, count = packed_of(job, slot_of(job, active) + pair - begin), min(LANES, end - pair)
        for row in range(LANES):
            keep(stage + LINE * row, zeros())
        for k in range(0, _padded(n), width):
            for row in range(count):
                token = entry_of(word(job, words.TOKENS), pair + row)
                source = word(job, words.SOURCE) + size_of(element) * (token * n + k)
                _copy(stage + LINE * row, source, n - k, element, vector)
            if packs_by_sixteen(vector):
                transpose_floats(stage, target, LINE)
            else:
                for four in range(0, count, 4):
                    transpose_pieces(stage + LINE * four, target + LINE * four)
            target += X_LINE


@helper
def _copy(target, source, count, element, vector):  # type: ignore[no-untyped-def]
    """A register of elements, of which `count` exist, if that is less."""
    if count >= width_of(vector):
        keep(target, take(source, element, vector))
    else:
        keep(target, take_first(source, max(count, 0), element, vector))


@helper
def unpack_floats(panel, here, rows, n, begin, end, element, vector):  # type: ignore[no-untyped-def]
    """Columns begin..end of up to sixteen rows of floats, the first of which lies at here[0], into a panel.

    Where they can be multiplied as they lie, they stay there: so memory is read while products are computed.
    """
    size, width = size_of(element), width_of(vector)
    if rows == PANEL_ROWS and n % PADDING == 0 and size == size_of(vector):
        return here[0] + size * begin, size * n
    for row in range(PANEL_ROWS):
        source, target = here[0] + size * n * min(row, rows - 1), panel + PITCH * row
        whole, stop = end - (end - begin) % width, begin + _padded(end - begin)
        for k in range(begin, whole, width):
            prefetch(source + size * (k + 2 * n))
            keep(target, take(source + size * k, element, vector))
            target += LINE
        for k in range(whole, stop, width):
            keep(target, take_first(source + size * k, max(end - k, 0), element, vector))
            target += LINE
    return panel, PITCH


@helper
def floats_at(layer, matrix, expert, row, n, element):  # type: ignore[no-untyped-def]
    """Where a row of floats and, if they existed, its scales lie."""
    return part(layer, matrix, expert) + size_of(element) * n * row, 0


@helper
def float_bytes(n, element):  # type: ignore[no-untyped-def]
    """Bytes of a row and of its scales."""
    return n * size_of(element), 0


@helper
def _activate(layer, expert, start, rows, first, second, count, target, element, vector):  # type: ignore[no-untyped-def]
    """Sixteen rows of the activated intermediate of up to sixteen pairs, packed; zeros beyond `rows`."""
    up_bias = part(layer, words.UP_BIAS, expert)
    first_bias = part(layer, words.GATE_BIAS, expert) if word(layer, words.GATE) else up_bias
    result, turned = reserve(_STAGE), reserve(_STAGE)
    for row in range(PANEL_ROWS):
        value = _activated(layer, first_bias, up_bias, start + row, row < rows, first, second, LINE * row, element)
        store(result + LINE * row, value)
    if packs_by_sixteen(vector):
        for row in range(0, PANEL_ROWS, 2):
            even, odd = load(result + LINE * row, _F32), load(result + LINE * (row + 1), _F32)
            keep_rows(target + size_of(vector) * LANES * (start + row), even, odd, vector)
    else:
        transpose_floats(result, turned, LINE)
        for four in range(0, count, 4):
            keep_pieces(turned + LINE * four, target + LINE * four, start, vector)


@helper
def _activated(layer, first_bias, up_bias, row, exists, first, second, offset, element):  # type: ignore[no-untyped-def]
    if not exists:
        return zeros()
    g, u = load(first + offset, _F32), load(second + offset, _F32)
    return combine(layer, g, splat(bias_at(first_bias, row, element)), u, splat(bias_at(up_bias, row, element)))


def make_panels(kind: str, place: Any, row_bytes: Any, unpack: Any) -> tuple[Any, Any]:
    """The functions that compute a unit of phase 1 and one expert's part of a unit of phase 2.

    Args:
        kind: a name for them.
        place: (layer, matrix, expert, row, n, element) to the addresses of a row's weights and scales.
        row_bytes: (n, element) to the bytes of both.
        unpack: (panel, here, rows, n, begin, end, element, vector) brings columns of rows into a panel, if need be;
            returns where they lie then, and how many bytes apart.
    """

    @helper_of(kind)
    def multiply(here, then, rows, n, x, x_pitch, pairs, target, element, vector):  # type: ignore[no-untyped-def]
        """Up to sixteen rows at `here` times packed vectors, into fp32 [pairs / 16, 16 rows, 16 pairs] at `target`.

        `x_pitch` bytes lie between sixteen vectors and the next. `then` is what will be multiplied next.
        """
        panel, blocks = reserve(_PANEL_BYTES), (pairs + LANES - 1) // LANES
        line, width = width_of(vector), _columns(vector)
        codes, scales = row_bytes(n, element)
        ask = (PANEL_ROWS * codes + LINE * (_padded(n) // line) - 1) // (LINE * (_padded(n) // line))
        for offset in range(0, PANEL_ROWS * scales, LINE):
            prefetch_later(then[1] + offset)
        for begin in range(0, n, width):
            w, pitch = unpack(panel, here, rows, n, begin, min(begin + width, n), element, vector)
            lines, skip = _padded(min(width, n - begin)) // line, begin // line
            ahead, y, fresh = then[0] + LINE * ask * skip, x + X_LINE * skip, begin == 0
            if line > LANES and multiply_tiles(w, pitch, y, x_pitch, lines, blocks, target, fresh, ahead, ask):
                continue
            for block in range(blocks):
                z, sums, count = y + block * x_pitch, target + SUMS * block, min(LANES, pairs - LANES * block)
                multiply_block(w, pitch, z, count, lines, sums, fresh, (ahead, ask * lines, block, blocks), vector)

    @helper_of(kind)
    def expand(job, layer, active, start, then, element, bias, vector):  # type: ignore[no-untyped-def]
        """Rows start..start + ROWS of one expert's activated intermediate, packed, for all its pairs."""
        expert = entry_of(word(job, words.EXPERTS), active)
        begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
        n, stop = word(layer, words.HIDDEN), word(layer, words.INTERMEDIATE)
        gated, first, second = word(layer, words.GATE) != 0, reserve(_SUMS), reserve(_SUMS)
        x_pitch, inner_pitch = LANES * word(job, words.PACKED_BYTES), LANES * word(job, words.INNER_BYTES)
        lead = words.GATE if gated else words.UP
        for pair in range(begin, end, _BATCH):
            slot, count = slot_of(job, active) + pair - begin, min(_BATCH, end - pair)
            for row in range(start, start + ROWS, PANEL_ROWS):
                rows = min(PANEL_ROWS, stop - row)
                if rows > 0:
                    up = place(layer, words.UP, expert, row, n, element)
                    after = place(layer, lead, expert, row + rows, n, element)
                    if row + PANEL_ROWS >= min(start + ROWS, stop):
                        after = place(layer, lead, entry_of(word(job, words.EXPERTS), then[0]), then[1], n, element)
                    x = packed_of(job, slot)
                    if gated:
                        gate = place(layer, words.GATE, expert, row, n, element)
                        multiply(gate, up, rows, n, x, x_pitch, count, first, element, vector)
                        multiply(up, after, rows, n, x, x_pitch, count, second, element, vector)
                    else:
                        multiply(up, after, rows, n, x, x_pitch, count, first, element, vector)
                for block in range((count + LANES - 1) // LANES):  # zeros where there are no rows, or NaN may lie there
                    target, sums = inner_of(job, slot) + inner_pitch * block, SUMS * block
                    here = min(LANES, count - LANES * block)
                    _activate(layer, expert, row, rows, first + sums, second + sums, here, target, bias, vector)

    @helper_of(kind)
    def contract(job, layer, active, start, stop, then, element, bias, vector):  # type: ignore[no-untyped-def]
        """Output columns start..stop of one expert and all its pairs."""
        expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
        begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
        n, pitch = word(layer, words.INTERMEDIATE), LANES * word(job, words.INNER_BYTES)
        sums, y = reserve(_SUMS), reserve(SUMS)
        for pair in range(begin, end, _BATCH):
            inner, count = inner_of(job, slot_of(job, active) + pair - begin), min(_BATCH, end - pair)
            for row in range(start, stop, PANEL_ROWS):
                rows, here = min(PANEL_ROWS, stop - row), place(layer, words.DOWN, expert, row, n, element)
                next_here = place(layer, words.DOWN, expert, row + rows, n, element)
                if row + PANEL_ROWS >= stop:
                    next_here = place(layer, words.DOWN, after, then[1], n, element)
                multiply(here, next_here, rows, n, inner, pitch, count, sums, element, vector)
                for block in range(0, count, LANES):
                    transpose_floats(sums + SUMS * (block // LANES), y, LINE)
                    for j in range(min(LANES, count - block)):
                        add_output(job, layer, expert, pair + block + j, row, row + rows, y + LINE * j, bias)

    return expand, contract
