"""Experts in the formats of quantised checkpoints: codes become fp32 in registers, activations stay as they are.

Up to four vectors of an expert multiply a row as it is read from memory; for more of them rows are unpacked (see
`panels`). With few vectors, numbers are summed unscaled within a block of weights that share a scale, which is applied
to the sum; where such blocks are shorter than `_COARSE`, to the weights.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba import words
from moebius.kernels.numba.decoding import decode, group_bytes, has_zero_point, scale_at, unit_of
from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.memory import peek, poke, reserve, size_of
from moebius.kernels.numba.outer import PANEL_ROWS, PITCH, keep_group
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, mul, prefetch, splat, sub, total, zeros
from moebius.kernels.numba.units import ROWS, activate, add_output, entry_of, inner_of, input_of, part, slot_of, word

FEW = 4  # pairs of an expert that are multiplied without a panel
_COARSE = 128  # columns: blocks of a multiple of so many are summed before they are scaled
_PITCH = 4 * ROWS  # bytes between the pairs in a block's results
_BLOCK = _PITCH * FEW
_AHEAD = 4096  # bytes, as in `portable`
_LINE = 64
_SCALES = words.GATE_SCALE - words.GATE  # from the word of a matrix to that of its scales
_ZEROS = words.GATE_ZERO - words.GATE
_F32, _EIGHT = np.float32(0), np.float32(8)


@helper
def code_bytes(n, element):  # type: ignore[no-untyped-def]
    """Bytes of a row's codes, and of the scales that a row has for itself."""
    return (n + GROUP - 1) // GROUP * group_bytes(element), 0


@helper
def codes_at(layer, matrix, expert, row, n, element):  # type: ignore[no-untyped-def]
    """Addresses of a row and its matrix's scales and zero points (or 0); the row; a scale's rows, columns and kind."""
    codes = part(layer, matrix, expert) + row * code_bytes(n, element)[0]
    scales, points = part(layer, matrix + _SCALES, expert), part(layer, matrix + _ZEROS, expert)
    return codes, scales, points, row, word(layer, words.SCALE_ROWS), _width(layer, n), word(layer, words.SCALE_KIND)


@helper
def unpack_codes(panel, here, rows, n, begin, end, element, vector):  # type: ignore[no-untyped-def]
    """Columns begin..end of up to sixteen rows, the first of which lies at `here`, into a panel."""
    pitch, _ = code_bytes(n, element)
    _, scales, points, start, scale_rows, width, kind = here
    for row in range(PANEL_ROWS):
        source, target = here[0] + pitch * min(row, rows - 1), panel + PITCH * row
        index, k = scale_index(start + min(row, rows - 1), scale_rows, width, n), begin
        while k < end:
            block, stop = index + k // width, min(k - k % width + width, end)
            scale, zero = splat(scale_at(scales, block, kind) * unit_of(element)), zero_at(points, block)
            for group in range(k, stop, GROUP):
                u, v = numbers_of(source + (group // GROUP) * group_bytes(element), zero, element)
                keep_group(target, mul(u, scale), mul(v, scale), vector)
                target += GROUP * size_of(vector)
            k = stop
    return panel, PITCH


@helper
def expand(job, layer, active, start, then, element, bias):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, rows = word(layer, words.HIDDEN), min(ROWS, word(layer, words.INTERMEDIATE) - start)
    gated = word(layer, words.GATE) != 0
    up, lead = codes_at(layer, words.UP, expert, start, n, element), words.GATE if gated else words.UP
    following, last = codes_at(layer, lead, after, then[1], n, element), end - 1
    first, second = reserve(_BLOCK), reserve(_BLOCK)
    x0, x1 = input_of(job, begin), input_of(job, min(begin + 1, last))
    x = x0, x1, input_of(job, min(begin + 2, last)), input_of(job, last)
    if gated:
        gate = codes_at(layer, words.GATE, expert, start, n, element)
        multiply(layer, gate, up, rows, n, x, end - begin, first, element)
        multiply(layer, up, following, rows, n, x, end - begin, second, element)
    else:
        multiply(layer, up, following, rows, n, x, end - begin, first, element)
    for j in range(end - begin):
        target = inner_of(job, slot_of(job, active) + j) + 4 * start
        activate(layer, expert, start, start + rows, first + j * _PITCH, second + j * _PITCH, target, bias)


@helper
def contract(job, layer, active, start, stop, then, element, bias):  # type: ignore[no-untyped-def]
    """Output columns start..stop of one expert and its pairs."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, slot, last, y = word(layer, words.INTERMEDIATE), slot_of(job, active), end - begin - 1, reserve(_BLOCK)
    x0, x1 = inner_of(job, slot), inner_of(job, slot + min(1, last))
    x = x0, x1, inner_of(job, slot + min(2, last)), inner_of(job, slot + last)
    for row in range(start, stop, ROWS):
        rows, here = min(ROWS, stop - row), codes_at(layer, words.DOWN, expert, row, n, element)
        following = codes_at(layer, words.DOWN, expert, row + rows, n, element)
        if row + ROWS >= stop:
            following = codes_at(layer, words.DOWN, after, then[1], n, element)
        multiply(layer, here, following, rows, n, x, end - begin, y, element)
        for j in range(end - begin):
            add_output(job, layer, expert, begin + j, row, row + rows, y + j * _PITCH, bias)


@helper
def _is_coarse(layer):  # type: ignore[no-untyped-def]
    return word(layer, words.SCALE_COLUMNS) % _COARSE == 0


@helper
def _width(layer, n):  # type: ignore[no-untyped-def]
    """Columns that share a scale."""
    columns = word(layer, words.SCALE_COLUMNS)
    return columns if columns else n


@helper
def scale_index(row, rows, width, n):  # type: ignore[no-untyped-def]
    """Index of a row's first scale, where `rows` share one (0: all)."""
    return (row // rows) * ((n + width - 1) // width) if rows else 0


@helper
def multiply(layer, here, then, rows, n, x, pairs, target, element):  # type: ignore[no-untyped-def]
    """Rows at `here` times up to four vectors of n, into fp32 rows at `target`; `then` is what will be read next."""
    pitch, width = code_bytes(n, element)[0], here[5]
    x0, x1, x2, x3 = x
    leap = (_AHEAD + pitch - 1) // pitch  # rows
    for row in range(rows):
        ahead = here[0] + (row + leap) * pitch if row + leap < rows else then[0] + (row + leap - rows) * pitch
        scales = (here[1], here[2], scale_index(here[3] + row, here[4], width, n), here[6], width)
        codes, place = here[0] + row * pitch, target + 4 * row
        if pairs == 1:
            if _is_coarse(layer):
                poke(place, _coarse1(codes, scales, x0, n, ahead, element))
            else:
                poke(place, _fine1(codes, scales, x0, n, ahead, element))
        else:
            y = _dot4(codes, scales, x0, x1, x2, x3, n, ahead, element)
            for j in range(pairs):
                poke(place + j * _PITCH, y[j])


@inner
def numbers_of(codes, zero, element):  # type: ignore[no-untyped-def]
    """A group's 32 numbers, less its zero point."""
    first, second = decode(codes, element)
    if has_zero_point(element):
        first, second = sub(first, splat(zero)), sub(second, splat(zero))
    return first, second


@inner
def zero_at(zero_points, index):  # type: ignore[no-untyped-def]
    return np.float32(peek(zero_points + index, np.uint8(0))) if zero_points else _EIGHT


@inner
def _scale(scales, block, element):  # type: ignore[no-untyped-def]
    return splat(scale_at(scales[0], scales[2] + block, scales[3]) * unit_of(element))


@helper
def _inputs(x, k, n):  # type: ignore[no-untyped-def]
    """The numbers k..k + 31 of a vector of n, zeros behind its end."""
    rest = n - k
    first = load(x + 4 * k, _F32) if rest >= LANES else load_first(x + 4 * k, rest, _F32)
    if rest >= GROUP:
        return first, load(x + 4 * (k + LANES), _F32)
    return first, load_first(x + 4 * (k + LANES), rest - LANES, _F32) if rest > LANES else zeros()


@helper
def _coarse1(codes, scales, x, n, ahead, element):  # type: ignore[no-untyped-def]
    """One row times one vector, a scale for a multiple of `_COARSE` columns (or all); so many a turn, four groups."""
    a, b, whole, size = zeros(), zeros(), n - n % _COARSE, group_bytes(element)
    per_block = (scales[4] + _COARSE - 1) // _COARSE
    block, left = 0, per_block
    for k in range(0, whole, _COARSE):
        w, y, zero = codes + (k // GROUP) * size, x + 4 * k, zero_at(scales[1], scales[2] + block)
        prefetch(ahead + (k // GROUP) * size)
        if size == 32:
            prefetch(ahead + (k // GROUP) * size + _LINE)
        p, q = _group(w, y, zero, zeros(), zeros(), element)
        r, s = _group(w + size, y + 2 * _LINE, zero, zeros(), zeros(), element)
        p, q = _group(w + 2 * size, y + 4 * _LINE, zero, p, q, element)
        r, s = _group(w + 3 * size, y + 6 * _LINE, zero, r, s, element)
        scale = _scale(scales, block, element)
        a, b = fma(add(p, q), scale, a), fma(add(r, s), scale, b)
        block, left = _next_block(block, left, per_block)
    if whole < n:
        p, q, zero = zeros(), zeros(), zero_at(scales[1], scales[2] + block)
        for k in range(whole, n, GROUP):
            u, v = numbers_of(codes + (k // GROUP) * size, zero, element)
            y0, y1 = _inputs(x, k, n)
            p, q = fma(u, y0, p), fma(v, y1, q)
        a = fma(add(p, q), _scale(scales, block, element), a)
    return total(add(a, b))


@inner
def _group(w, y, zero, p, q, element):  # type: ignore[no-untyped-def]
    """The products of a group, added to two sums."""
    u, v = numbers_of(w, zero, element)
    return fma(u, load(y, _F32), p), fma(v, load(y + _LINE, _F32), q)


@helper
def _fine1(codes, scales, x, n, ahead, element):  # type: ignore[no-untyped-def]
    """One row times one vector, a scale for each few groups; four groups a turn, with sums of their own."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    per_block, size = scales[4] // GROUP, group_bytes(element)
    whole = n - n % (4 * GROUP)
    block, left = 0, per_block
    for k in range(0, whole, 4 * GROUP):
        w, y = codes + (k // GROUP) * size, x + 4 * k
        prefetch(ahead + (k // GROUP) * size)
        if size == 32:
            prefetch(ahead + (k // GROUP) * size + _LINE)
        a = _fine_step(w, y, scales, block, a, element)
        block, left = _next_block(block, left, per_block)
        b = _fine_step(w + size, y + 2 * _LINE, scales, block, b, element)
        block, left = _next_block(block, left, per_block)
        c = _fine_step(w + 2 * size, y + 4 * _LINE, scales, block, c, element)
        block, left = _next_block(block, left, per_block)
        d = _fine_step(w + 3 * size, y + 6 * _LINE, scales, block, d, element)
        block, left = _next_block(block, left, per_block)
    for k in range(whole, n, GROUP):
        u, v = numbers_of(codes + (k // GROUP) * size, zero_at(scales[1], scales[2] + block), element)
        y0, y1 = _inputs(x, k, n)
        a = fma(fma(v, y1, mul(u, y0)), _scale(scales, block, element), a)
        block, left = _next_block(block, left, per_block)
    return total(add(add(a, b), add(c, d)))


@inner
def _fine_step(w, y, scales, block, sums, element):  # type: ignore[no-untyped-def]
    """One group, with the scale of its block."""
    u, v = numbers_of(w, zero_at(scales[1], scales[2] + block), element)
    return fma(fma(v, load(y + _LINE, _F32), mul(u, load(y, _F32))), _scale(scales, block, element), sums)


@inner
def _next_block(block, left, per_block):  # type: ignore[no-untyped-def]
    """The block of the next group, and how many groups it still has: a division would cost more than the group."""
    return (block + 1, per_block) if left == 1 else (block, left - 1)


@helper
def _dot4(codes, scales, x0, x1, x2, x3, n, ahead, element):  # type: ignore[no-untyped-def]
    """One row times four vectors, blocks of any size."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    size, width = group_bytes(element), scales[4]
    for block in range((n + width - 1) // width):
        zero, stop = zero_at(scales[1], scales[2] + block), min(block * width + width, n)
        p0, p1, p2, p3 = zeros(), zeros(), zeros(), zeros()
        for k in range(block * width, stop - stop % GROUP, GROUP):
            prefetch(ahead + (k // GROUP) * size)
            u, v = numbers_of(codes + (k // GROUP) * size, zero, element)
            y0, y1, y2, y3 = x0 + 4 * k, x1 + 4 * k, x2 + 4 * k, x3 + 4 * k
            p0, p1 = fma(u, load(y0, _F32), p0), fma(u, load(y1, _F32), p1)
            p2, p3 = fma(u, load(y2, _F32), p2), fma(u, load(y3, _F32), p3)
            p0, p1 = fma(v, load(y0 + _LINE, _F32), p0), fma(v, load(y1 + _LINE, _F32), p1)
            p2, p3 = fma(v, load(y2 + _LINE, _F32), p2), fma(v, load(y3 + _LINE, _F32), p3)
        if stop % GROUP:
            k = stop - stop % GROUP
            u, v = numbers_of(codes + (k // GROUP) * size, zero, element)
            (y0, z0), (y1, z1) = _inputs(x0, k, n), _inputs(x1, k, n)
            (y2, z2), (y3, z3) = _inputs(x2, k, n), _inputs(x3, k, n)
            p0, p1, p2, p3 = fma(u, y0, p0), fma(u, y1, p1), fma(u, y2, p2), fma(u, y3, p3)
            p0, p1, p2, p3 = fma(v, z0, p0), fma(v, z1, p1), fma(v, z2, p2), fma(v, z3, p3)
        scale = _scale(scales, block, element)
        a0, a1, a2, a3 = fma(p0, scale, a0), fma(p1, scale, a1), fma(p2, scale, a2), fma(p3, scale, a3)
    return total(a0), total(a1), total(a2), total(a3)
