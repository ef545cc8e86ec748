"""Rows of codes times quantised activations (see `groups`): one vector at the speed of memory, or many in tiles.

Products are exact in int32 within a group; the groups are summed in fp32, in an order that depends on the row's length
alone. Addresses in, no checks; loads may pass the end of a matrix of codes by less than 64 bytes, which the scales
behind it in the record cover.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.groups import CHUNK, PLANE, chunk_bytes, half_of, place_of, scales_of
from moebius.kernels.numba.integers import (
    add_ints,
    dot_bytes,
    floats,
    high_halves,
    load_bytes,
    load_ints,
    low_halves,
    no_ints,
    pack_codes,
    planes,
    plus_128,
    repeat_bytes,
    repeat_int,
    spread,
    times_256,
    transpose_floats,
)
from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.memory import peek, reserve
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, mul, prefetch, splat, store, total, zeros

_F32, _FP16 = np.float32(0), np.int16(0)
_LINE = 64
_STAGE = 4 * LANES * LANES
ROWS = 32  # of a tile
PANEL = ROWS * PLANE  # bytes of a chunk of a tile's codes, then its scales: fp32 [CHUNK, ROWS]
PANEL_BYTES = PANEL + 4 * CHUNK * ROWS


@helper
def group_bytes(element):  # type: ignore[no-untyped-def]
    """Bytes of a group's codes."""
    return 16 * planes(element)


@inner
def _product(codes, x, element):  # type: ignore[no-untyped-def]
    """64 bytes of codes times the activations that belong to them, summed by fours."""
    w = load_bytes(codes)
    if planes(element) == 2:
        w = plus_128(w)
        upper = dot_bytes(no_ints(), w, load_bytes(x))
        return floats(dot_bytes(times_256(upper), w, load_bytes(x + PLANE)))
    first = dot_bytes(no_ints(), low_halves(w), load_bytes(x))
    return floats(dot_bytes(first, high_halves(w), load_bytes(x + _LINE)))


@helper
def dot(codes, scales, x, groups, ahead, ahead_scales, element):  # type: ignore[no-untyped-def]
    """One row times one vector. `ahead` and `ahead_scales` are what will be read some rows later, as long as this."""
    a, b, offsets, products = zeros(), zeros(), zeros(), reserve(_LINE)
    per_line = 4 // planes(element)  # groups in 64 bytes of codes
    step = 32 * per_line  # bytes of x beside 64 bytes of codes
    whole = groups // CHUNK
    for chunk in range(whole):
        prefetch(ahead_scales + 2 * CHUNK * chunk)
        s = mul(load(scales + 2 * CHUNK * chunk, _FP16), load(scales_of(x, element), _F32))
        offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        store(products, s)
        for line in range(0, CHUNK // per_line, 2):
            skip = _LINE * (chunk * (CHUNK // per_line) + line)
            prefetch(ahead + skip)
            prefetch(ahead + skip + _LINE)
            y, t = x + step * line, products + 4 * per_line * line
            a = fma(_product(codes + skip, y, element), spread(t, element), a)
            b = fma(_product(codes + skip + _LINE, y + step, element), spread(t + 4 * per_line, element), b)
        x += chunk_bytes(element)
    rest = groups - CHUNK * whole
    if rest:
        s = mul(load_first(scales + 2 * CHUNK * whole, rest, _FP16), load_first(scales_of(x, element), rest, _F32))
        offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        store(products, s)
        for line in range((rest + per_line - 1) // per_line):
            skip = _LINE * (whole * (CHUNK // per_line) + line)
            prefetch(ahead + skip)
            t = products + 4 * per_line * line
            a = fma(_product(codes + skip, x + step * line, element), spread(t, element), a)
    return total(add(add(a, b), offsets))


@helper
def pack(here, then, groups, chunk, rows, panel, element):  # type: ignore[no-untyped-def]
    """Bring a chunk of up to 32 rows into the order in which `tile` reads it, and ask for the next chunk's scales.

    `here` and `then` are addresses of codes and scales, of rows of `groups`. Rows beyond the last repeat it.

    Returns:
        Address of the codes of the next chunk.
    """
    pitch, per_line, count = groups * group_bytes(element), 4 // planes(element), min(CHUNK, groups - CHUNK * chunk)
    lines, width = (count + per_line - 1) // per_line, _LINE * (CHUNK // per_line)
    codes, scales = here[0] + width * chunk, here[1] + 2 * CHUNK * chunk
    ahead, ahead_scales, staged = codes + width, scales + 2 * CHUNK, reserve(_STAGE)
    if CHUNK * (chunk + 1) >= groups:
        ahead, ahead_scales = then
    for half in range(0, ROWS, LANES):
        first, last = min(half, rows - 1), max(min(rows - half, LANES) - 1, 0)
        for line in range(lines):
            target = panel + 2 * 8 * _LINE * per_line * line + _LINE * (half // LANES)
            pack_codes(codes + first * pitch + _LINE * line, pitch, last, target, 2 * _LINE, element)
        for row in range(LANES):
            source = scales + 2 * groups * (first + min(row, last))
            values = load(source, _FP16) if count == CHUNK else load_first(source, count, _FP16)
            store(staged + _LINE * row, values)
            prefetch(ahead_scales + 2 * groups * (first + min(row, last)))
        transpose_floats(staged, panel + PANEL + 4 * half, 4 * ROWS)
    return ahead


@inner
def _step(i, w0, w1, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    i00, i01, i02, i03, i10, i11, i12, i13 = i
    i00, i01, i02, i03 = dot_bytes(i00, w0, x0), dot_bytes(i01, w0, x1), dot_bytes(i02, w0, x2), dot_bytes(i03, w0, x3)
    i10, i11, i12, i13 = dot_bytes(i10, w1, x0), dot_bytes(i11, w1, x1), dot_bytes(i12, w1, x2), dot_bytes(i13, w1, x3)
    return i00, i01, i02, i03, i10, i11, i12, i13


@inner
def _half_group(i, w, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """Sixteen columns: four steps of four."""
    for k in range(4):
        place, column = w + 2 * _LINE * k, 4 * k
        i = _step(
            i, load_bytes(place), load_bytes(place + _LINE), repeat_bytes(x0 + column), repeat_bytes(x1 + column),
            repeat_bytes(x2 + column), repeat_bytes(x3 + column),
        )  # fmt: skip
    return i


@inner
def _group(i, w, x0, x1, x2, x3, element):  # type: ignore[no-untyped-def]
    half = half_of(element)
    i = _half_group(i, w, x0, x1, x2, x3)
    return _half_group(i, w + 8 * _LINE, x0 + half, x1 + half, x2 + half, x3 + half)


@inner
def _scaled(a, i, s0, s1, t0, t1, t2, t3):  # type: ignore[no-untyped-def]
    a00, a01, a02, a03, a10, a11, a12, a13 = a
    i00, i01, i02, i03, i10, i11, i12, i13 = i
    a00, a01 = fma(mul(floats(i00), s0), t0, a00), fma(mul(floats(i01), s0), t1, a01)
    a02, a03 = fma(mul(floats(i02), s0), t2, a02), fma(mul(floats(i03), s0), t3, a03)
    a10, a11 = fma(mul(floats(i10), s1), t0, a10), fma(mul(floats(i11), s1), t1, a11)
    a12, a13 = fma(mul(floats(i12), s1), t2, a12), fma(mul(floats(i13), s1), t3, a13)
    return a00, a01, a02, a03, a10, a11, a12, a13


@inner
def _times_256(i):  # type: ignore[no-untyped-def]
    i00, i01, i02, i03, i10, i11, i12, i13 = i
    i00, i01, i02, i03 = times_256(i00), times_256(i01), times_256(i02), times_256(i03)
    return i00, i01, i02, i03, times_256(i10), times_256(i11), times_256(i12), times_256(i13)


@inner
def _ask_for(ahead, pitch, group, element):  # type: ignore[no-untyped-def]
    """The part of a chunk of 32 rows that is due with a group, so that all of it is asked for in sixteen groups.

    On one core of a Zen 5, 8 vectors, weights from memory: 20.5 ms; 23.4 where `pack` asks, 27.4 where nobody does.
    """
    per_line = 4 // planes(element)
    rows = ROWS // per_line
    begin = ahead + _LINE * (group // per_line) + rows * (group % per_line) * pitch
    for row in range(rows):
        prefetch(begin + row * pitch)


@inner
def _plus(i, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
    i00, i01, i02, i03, i10, i11, i12, i13 = i
    i00, i01, i02, i03 = add_ints(i00, c0), add_ints(i01, c1), add_ints(i02, c2), add_ints(i03, c3)
    return i00, i01, i02, i03, add_ints(i10, c0), add_ints(i11, c1), add_ints(i12, c2), add_ints(i13, c3)


@helper
def tile(panel, ahead, pitch, groups, x0, x1, x2, x3, t0, t1, t2, t3, fresh, element):  # type: ignore[no-untyped-def]
    """A packed chunk of 32 rows times a chunk of four vectors, added to (`fresh`: written to) fp32 [32] at t0..t3.

    `ahead`, if any, is the address of the codes of the chunk that comes next, in rows `pitch` bytes apart.
    """
    z = zeros()
    a = (z, z, z, z, z, z, z, z)
    if not fresh:
        a = (
            load(t0, _F32), load(t1, _F32), load(t2, _F32), load(t3, _F32),
            load(t0 + _LINE, _F32), load(t1 + _LINE, _F32), load(t2 + _LINE, _F32), load(t3 + _LINE, _F32),
        )  # fmt: skip
    plane = scales_of(0, element)
    for group in range(groups):
        w, place = panel + 16 * _LINE * group, place_of(group, element)
        if ahead:
            _ask_for(ahead, pitch, group, element)
        scale, correction = plane + 4 * group, plane + _LINE + 4 * group
        c0, c1, c2, c3 = (
            repeat_int(x0 + correction), repeat_int(x1 + correction),
            repeat_int(x2 + correction), repeat_int(x3 + correction),
        )  # fmt: skip
        i = (c0, c1, c2, c3, c0, c1, c2, c3)
        if planes(element) == 2:  # 256 times the upper plane, then the lower one
            n = no_ints()
            i = _group((n, n, n, n, n, n, n, n), w, x0 + place, x1 + place, x2 + place, x3 + place, element)
            i = _plus(_times_256(i), c0, c1, c2, c3)
            place += PLANE
        i = _group(i, w, x0 + place, x1 + place, x2 + place, x3 + place, element)
        weights = panel + PANEL + 4 * ROWS * group
        a = _scaled(
            a, i, load(weights, _F32), load(weights + _LINE, _F32),
            splat(peek(x0 + scale, _F32)), splat(peek(x1 + scale, _F32)),
            splat(peek(x2 + scale, _F32)), splat(peek(x3 + scale, _F32)),
        )  # fmt: skip
    a00, a01, a02, a03, a10, a11, a12, a13 = a
    store(t0, a00), store(t1, a01), store(t2, a02), store(t3, a03)
    store(t0 + _LINE, a10), store(t1 + _LINE, a11), store(t2 + _LINE, a12), store(t3 + _LINE, a13)
