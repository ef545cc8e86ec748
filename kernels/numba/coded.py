"""Experts in the formats of quantised checkpoints: codes become fp32 in registers, activations stay as they are.

Up to four vectors of an expert multiply a row as it is read from memory. More of them share a panel: a block of rows
decoded once, in bf16 where that is exact and inputs are bf16 too. Numbers are summed unscaled within a block of weights
that share a scale, which is applied to the sum; where such blocks are shorter than `_COARSE`, to the weights.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba import portable, words
from moebius.kernels.numba.bfloats import multiplies_pairs, store_bf16
from moebius.kernels.numba.decoding import (
    E2M1_CODE,
    E4M3_CODE,
    E8M0_SCALE,
    INT4_CODE,
    INT8_CODE,
    add_fours,
    decode,
    group_bytes,
    has_zero_point,
    repeat_four,
    scale_at,
    store_truncated,
    unit_of,
)
from moebius.kernels.numba.jit import entry, helper, inner
from moebius.kernels.numba.memory import peek, poke, reserve
from moebius.kernels.numba.simd import (
    LANES,
    add,
    fma,
    load,
    load_first,
    mul,
    prefetch,
    splat,
    store,
    sub,
    total,
    zeros,
)
from moebius.kernels.numba.tiles import dot4x4
from moebius.kernels.numba.units import (
    ROWS,
    activate,
    add_output,
    entry_of,
    inner_of,
    input_of,
    make_work,
    part,
    source_of,
    word,
)

_COARSE = 128  # columns: blocks of a multiple of so many are summed before they are scaled
_CHUNK = 512  # columns of a panel at most
_BATCH = 64  # pairs that a panel serves
_FEW = 4  # pairs of an expert that are multiplied without a panel
_PITCH = 4 * ROWS  # bytes between the pairs of a batch in a block's results
_BLOCK = _PITCH * _BATCH
_PANEL = 4 * ROWS * _CHUNK
_SCALES = 4 * ROWS
_AHEAD = 4096  # bytes, as in `portable`
_LINE = 64
_F32, _BITS, _ONE, _EIGHT = np.float32(0), np.uint16(0), np.float32(1), np.float32(8)


@helper
def expand(job, layer, active, start, element):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate, for all its pairs."""
    expert = entry_of(word(job, words.EXPERTS), active)
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, stop = word(layer, words.HIDDEN), min(start + ROWS, word(layer, words.INTERMEDIATE))
    gated, in_bf16 = word(layer, words.GATE) != 0, _in_bf16(job, layer, end - begin)
    up = _block(layer, words.UP, words.UP_SCALE, words.UP_ZERO, expert, start, n, element)
    gate = _block(layer, words.GATE, words.GATE_SCALE, words.GATE_ZERO, expert, start, n, element) if gated else up
    first, second, result = reserve(_BLOCK), reserve(_BLOCK), reserve(_PITCH)
    for batch in range(begin, end, _BATCH):
        count = min(_BATCH, end - batch)
        inputs = (job, batch, count, end - begin, in_bf16)
        multiply(layer, gate, up, stop - start, n, inputs, False, first, element)
        if gated:
            multiply(layer, up, up, stop - start, n, inputs, False, second, element)
        for j in range(count):
            place = inner_of(job, batch + j)
            target = result if in_bf16 else place + 4 * start
            activate(layer, expert, start, stop, first + j * _PITCH, second + j * _PITCH, target, _F32)
            if in_bf16:
                for row in range(start, stop, LANES):  # INNER_BYTES leaves room for whole vectors
                    store_bf16(place + 2 * row, load(result + 4 * (row - start), _F32))


@helper
def contract(job, layer, start, columns, element):  # type: ignore[no-untyped-def]
    """Output columns start..start + columns of all experts and pairs, in ascending order of experts."""
    stop, n = min(start + columns, word(layer, words.HIDDEN)), word(layer, words.INTERMEDIATE)
    experts, offsets, active = word(job, words.EXPERTS), word(job, words.OFFSETS), word(job, words.ACTIVE)
    y = reserve(_BLOCK)
    for i in range(active):
        expert, begin, end = entry_of(experts, i), entry_of(offsets, i), entry_of(offsets, i + 1)
        after, in_bf16 = entry_of(experts, min(i + 1, active - 1)), _in_bf16(job, layer, end - begin)
        for batch in range(begin, end, _BATCH):
            count = min(_BATCH, end - batch)
            for row in range(start, stop, ROWS):
                rows = min(ROWS, stop - row)
                here = _block(layer, words.DOWN, words.DOWN_SCALE, words.DOWN_ZERO, expert, row, n, element)
                then = _block(layer, words.DOWN, words.DOWN_SCALE, words.DOWN_ZERO, after, row, n, element)
                multiply(layer, here, then, rows, n, (job, batch, count, end - begin, in_bf16), True, y, element)
                for j in range(count):
                    add_output(job, layer, expert, batch + j, row, row + rows, y + j * _PITCH, _F32)


@helper
def _block(layer, index, scale, zero, expert, start, n, element):  # type: ignore[no-untyped-def]
    """Addresses of a matrix's codes from row `start` on, of all its scales and zero points (or 0), and `start`."""
    codes = part(layer, index, expert) + start * _row_bytes(n, element)
    return codes, part(layer, scale, expert), part(layer, zero, expert), start


@helper
def _row_bytes(n, element):  # type: ignore[no-untyped-def]
    return (n + GROUP - 1) // GROUP * group_bytes(element)


@helper
def _in_bf16(job, layer, pairs):  # type: ignore[no-untyped-def]
    """Whether an expert's panel is bf16: codes are exact in it, and so are codes times powers of two."""
    exact = _is_coarse(layer) or word(layer, words.SCALE_KIND) == E8M0_SCALE
    return multiplies_pairs() and pairs > _FEW and exact and word(job, words.SOURCE_KIND) == portable.BF16


@helper
def _is_coarse(layer):  # type: ignore[no-untyped-def]
    return word(layer, words.SCALE_COLUMNS) % _COARSE == 0


@helper
def _width(layer, n):  # type: ignore[no-untyped-def]
    """Columns that share a scale."""
    columns = word(layer, words.SCALE_COLUMNS)
    return columns if columns else n


@helper
def _scale_index(layer, row, n):  # type: ignore[no-untyped-def]
    """Index of a row's first scale."""
    rows, width = word(layer, words.SCALE_ROWS), _width(layer, n)
    return (row // rows) * ((n + width - 1) // width) if rows else 0


@helper
def multiply(layer, here, then, rows, n, inputs, inner, target, element):  # type: ignore[no-untyped-def]
    """Rows of a block (see `_block`) times vectors, into fp32 rows at `target`; `then` is the block that comes next.

    `inputs` are the job, its first pair, the number of pairs, that of all pairs of the expert, which alone decides how
    they are computed, and whether vectors are bf16; `inner`: the vectors are intermediates, not inputs.
    """
    if inputs[3] <= _FEW:
        _multiply_few(layer, here, then, rows, n, inputs, inner, target, element)
    else:
        _multiply_many(layer, here, rows, n, inputs, inner, target, element)


@helper
def _multiply_few(layer, here, then, rows, n, inputs, inner, target, element):  # type: ignore[no-untyped-def]
    job, batch, count, _, _ = inputs
    pitch, kind, width = _row_bytes(n, element), word(layer, words.SCALE_KIND), _width(layer, n)
    leap = (_AHEAD + pitch - 1) // pitch  # rows
    x0, x1 = _vector(job, batch, inner, False), _vector(job, batch + min(1, count - 1), inner, False)
    x2, x3 = _vector(job, batch + min(2, count - 1), inner, False), _vector(job, batch + count - 1, inner, False)
    for row in range(rows):
        ahead = here[0] + (row + leap) * pitch if row + leap < rows else then[0] + (row + leap - rows) * pitch
        index = _scale_index(layer, here[3] + row, n)
        scales = (here[1], here[2], index, kind, width)
        codes, place = here[0] + row * pitch, target + 4 * row
        if count == 1:
            if _is_coarse(layer):
                poke(place, _coarse1(codes, scales, x0, n, ahead, element))
            else:
                poke(place, _fine1(codes, scales, x0, n, ahead, element))
        else:
            y = _dot4(codes, scales, x0, x1, x2, x3, n, ahead, element)
            for j in range(count):
                poke(place + j * _PITCH, y[j])


@helper
def _vector(job, pair, inner, in_bf16):  # type: ignore[no-untyped-def]
    if inner:
        return inner_of(job, pair)
    return source_of(job, pair) if in_bf16 else input_of(job, pair)


@inner
def _numbers(codes, zero, element):  # type: ignore[no-untyped-def]
    """A group's 32 numbers, less its zero point."""
    first, second = decode(codes, element)
    if has_zero_point(element):
        first, second = sub(first, splat(zero)), sub(second, splat(zero))
    return first, second


@inner
def _zero_at(zero_points, index):  # type: ignore[no-untyped-def]
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
    """One row times one vector, blocks of a multiple of 64 columns (all of them where there is one block)."""
    a, b, width, whole = zeros(), zeros(), scales[4], n - n % (2 * GROUP)
    size = group_bytes(element)
    for block in range((n + width - 1) // width):
        zero = _zero_at(scales[1], scales[2] + block)
        p0, p1, p2, p3 = zeros(), zeros(), zeros(), zeros()
        for k in range(block * width, min(block * width + width, whole), 2 * GROUP):
            w, y = codes + (k // GROUP) * size, x + 4 * k
            prefetch(ahead + (k // GROUP) * size)
            u, v = _numbers(w, zero, element)
            p0, p1 = fma(u, load(y, _F32), p0), fma(v, load(y + _LINE, _F32), p1)
            u, v = _numbers(w + size, zero, element)
            p2, p3 = fma(u, load(y + 2 * _LINE, _F32), p2), fma(v, load(y + 3 * _LINE, _F32), p3)
        if block * width + width >= n:
            for k in range(whole, n, GROUP):
                u, v = _numbers(codes + (k // GROUP) * size, zero, element)
                y0, y1 = _inputs(x, k, n) if k + GROUP > n else (load(x + 4 * k, _F32), load(x + 4 * k + _LINE, _F32))
                p0, p1 = fma(u, y0, p0), fma(v, y1, p1)
        scale = _scale(scales, block, element)
        a, b = fma(add(p0, p1), scale, a), fma(add(p2, p3), scale, b)
    return total(add(a, b))


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
        u, v = _numbers(codes + (k // GROUP) * size, _zero_at(scales[1], scales[2] + block), element)
        y0, y1 = _inputs(x, k, n)
        a = fma(fma(v, y1, mul(u, y0)), _scale(scales, block, element), a)
        block, left = _next_block(block, left, per_block)
    return total(add(add(a, b), add(c, d)))


@inner
def _fine_step(w, y, scales, block, sums, element):  # type: ignore[no-untyped-def]
    """One group, with the scale of its block."""
    u, v = _numbers(w, _zero_at(scales[1], scales[2] + block), element)
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
        zero, stop = _zero_at(scales[1], scales[2] + block), min(block * width + width, n)
        p0, p1, p2, p3 = zeros(), zeros(), zeros(), zeros()
        for k in range(block * width, stop - stop % GROUP, GROUP):
            prefetch(ahead + (k // GROUP) * size)
            u, v = _numbers(codes + (k // GROUP) * size, zero, element)
            y0, y1, y2, y3 = x0 + 4 * k, x1 + 4 * k, x2 + 4 * k, x3 + 4 * k
            p0, p1 = fma(u, load(y0, _F32), p0), fma(u, load(y1, _F32), p1)
            p2, p3 = fma(u, load(y2, _F32), p2), fma(u, load(y3, _F32), p3)
            p0, p1 = fma(v, load(y0 + _LINE, _F32), p0), fma(v, load(y1 + _LINE, _F32), p1)
            p2, p3 = fma(v, load(y2 + _LINE, _F32), p2), fma(v, load(y3 + _LINE, _F32), p3)
        if stop % GROUP:
            k = stop - stop % GROUP
            u, v = _numbers(codes + (k // GROUP) * size, zero, element)
            (y0, z0), (y1, z1) = _inputs(x0, k, n), _inputs(x1, k, n)
            (y2, z2), (y3, z3) = _inputs(x2, k, n), _inputs(x3, k, n)
            p0, p1, p2, p3 = fma(u, y0, p0), fma(u, y1, p1), fma(u, y2, p2), fma(u, y3, p3)
            p0, p1, p2, p3 = fma(v, z0, p0), fma(v, z1, p1), fma(v, z2, p2), fma(v, z3, p3)
        scale = _scale(scales, block, element)
        a0, a1, a2, a3 = fma(p0, scale, a0), fma(p1, scale, a1), fma(p2, scale, a2), fma(p3, scale, a3)
    return total(a0), total(a1), total(a2), total(a3)


@helper
def _multiply_many(layer, here, rows, n, inputs, inner, target, element):  # type: ignore[no-untyped-def]
    job, batch, count, _, in_bf16 = inputs
    panel, factors = reserve(_PANEL), reserve(_SCALES)
    for offset in range(0, _PITCH * ((count + 3) // 4 * 4), _LINE):
        store(target + offset, zeros())
    chunk = min(_width(layer, n), _CHUNK) if _is_coarse(layer) else _CHUNK
    start = 0
    while start < n:
        width = min(chunk, n - start)
        if _is_coarse(layer):  # a chunk ends where its block ends
            block_width = _width(layer, n)
            width = min(width, block_width - start % block_width)
        if in_bf16:
            _fill(layer, here, rows, n, start, width, panel, factors, True, element)
            _multiply_panel(panel, factors, rows, start, width, job, batch, count, inner, target, True, _BITS)
        else:
            _fill(layer, here, rows, n, start, width, panel, factors, False, element)
            _multiply_panel(panel, factors, rows, start, width, job, batch, count, inner, target, False, _F32)
        start += width


@helper
def _fill(layer, here, rows, n, start, width, panel, factors, in_bf16, element):  # type: ignore[no-untyped-def]
    """Decode `width` columns from `start` on into a panel of rows, and write the factors of their sums."""
    pitch, kind, per_scale = _row_bytes(n, element), word(layer, words.SCALE_KIND), _width(layer, n)
    coarse, size = _is_coarse(layer), 2 if in_bf16 else 4
    for row in range(rows):
        index = _scale_index(layer, here[3] + row, n)
        codes, place = here[0] + row * pitch + (start // GROUP) * group_bytes(element), panel + row * size * _CHUNK
        first = index + start // per_scale
        scale, zero = scale_at(here[1], first, kind) * unit_of(element), _zero_at(here[2], first)
        poke(factors + 4 * row, scale if coarse else _ONE)
        for k in range(0, width, GROUP):
            u, v = _numbers_of(codes + (k // GROUP) * group_bytes(element), here, index + (start + k) // per_scale,
                               zero, kind, coarse, element)  # fmt: skip
            if in_bf16:
                store_truncated(place + 2 * k, u)
                store_truncated(place + 2 * (k + LANES), v)
            else:
                store(place + 4 * k, u)
                store(place + 4 * (k + LANES), v)


@inner
def _numbers_of(codes, here, block, zero, kind, coarse, element):  # type: ignore[no-untyped-def]
    """A group's numbers, scaled where blocks are not `coarse`."""
    if coarse:
        return _numbers(codes, zero, element)
    u, v = _numbers(codes, _zero_at(here[2], block), element)
    scale = splat(scale_at(here[1], block, kind) * unit_of(element))
    return mul(u, scale), mul(v, scale)


@helper
def _multiply_panel(  # type: ignore[no-untyped-def]
    panel, factors, rows, start, width, job, batch, count, inner, target, in_bf16, vector
):
    size = 2 if in_bf16 else 4
    pitch, skip = size * _CHUNK, size * start
    for j in range(0, count, 4):
        x0 = _vector(job, batch + j, inner, in_bf16) + skip
        x1 = _vector(job, batch + min(j + 1, count - 1), inner, in_bf16) + skip
        x2 = _vector(job, batch + min(j + 2, count - 1), inner, in_bf16) + skip
        x3 = _vector(job, batch + min(j + 3, count - 1), inner, in_bf16) + skip
        for row in range(0, rows, 4):
            w0, w1 = panel + row * pitch, panel + min(row + 1, rows - 1) * pitch
            w2, w3 = panel + min(row + 2, rows - 1) * pitch, panel + min(row + 3, rows - 1) * pitch
            z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, width, w0, vector, vector)
            add_fours(target + j * _PITCH + 4 * row, _PITCH, mul(z, repeat_four(factors + 4 * row)))


work = make_work(portable.prepare, expand, contract)  # (job, element); `element` tells the code (see `decoding`)


@entry("void(int64)", callback=True)
def work_int8(job):  # type: ignore[no-untyped-def]
    work(job, INT8_CODE)


@entry("void(int64)", callback=True)
def work_int4(job):  # type: ignore[no-untyped-def]
    work(job, INT4_CODE)


@entry("void(int64)", callback=True)
def work_e4m3(job):  # type: ignore[no-untyped-def]
    work(job, E4M3_CODE)


@entry("void(int64)", callback=True)
def work_e2m1(job):  # type: ignore[no-untyped-def]
    work(job, E2M1_CODE)
