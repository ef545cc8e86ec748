"""A row of codes times a vector of quantised activations (see `groups`).

Products are exact in int32 within a group; the groups are summed in fp32, in an order that depends on the row's length
alone. Addresses in, no checks; loads may pass the end of a matrix of codes by less than 64 bytes, which the scales
behind it in the record cover.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.groups import CHUNK, PLANE, chunk_bytes, scales_of
from moebius.kernels.numba.integers import (
    dot_bytes,
    floats,
    high_halves,
    load_bytes,
    load_ints,
    low_halves,
    no_ints,
    planes,
    plus_128,
    second_eight,
    spread,
    times_256,
)
from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.simd import add, fma, load, load_first, mul, prefetch, total, zeros

_F32, _FP16 = np.float32(0), np.int16(0)
_LINE = 64


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


@inner
def _four_lines(a, b, codes, x, scales, count, ahead, element):  # type: ignore[no-untyped-def]
    """The products of up to four lines of codes, each times the scales of its groups, added to two sums in turn."""
    step = 32 * (4 // planes(element))  # bytes of x beside a line
    prefetch(ahead)
    a = fma(_product(codes, x, element), spread(scales, 0, element), a)
    if count > 1:
        prefetch(ahead + _LINE)
        b = fma(_product(codes + _LINE, x + step, element), spread(scales, 1, element), b)
    if count > 2:
        prefetch(ahead + 2 * _LINE)
        a = fma(_product(codes + 2 * _LINE, x + 2 * step, element), spread(scales, 2, element), a)
    if count > 3:
        prefetch(ahead + 3 * _LINE)
        b = fma(_product(codes + 3 * _LINE, x + 3 * step, element), spread(scales, 3, element), b)
    return a, b


@inner
def _lines(a, b, codes, x, scales, count, ahead, element):  # type: ignore[no-untyped-def]
    """As `_four_lines`, of all lines of a chunk: four beside int4, eight beside int8."""
    a, b = _four_lines(a, b, codes, x, scales, count, ahead, element)
    if planes(element) == 2 and count > 4:
        codes, x, ahead = codes + 4 * _LINE, x + 4 * _LINE, ahead + 4 * _LINE
        a, b = _four_lines(a, b, codes, x, second_eight(scales), count - 4, ahead, element)
    return a, b


@helper
def dot(codes, scales, x, groups, ahead, ahead_scales, element):  # type: ignore[no-untyped-def]
    """One row times one vector. `ahead` and `ahead_scales` are what will be read some rows later, as long as this."""
    a, b, offsets = zeros(), zeros(), zeros()
    per_line = 4 // planes(element)  # groups in a line of codes
    whole, line_count = groups // CHUNK, CHUNK // per_line
    for _ in range(whole):
        prefetch(ahead_scales)
        s = mul(load(scales, _FP16), load(scales_of(x, element), _F32))
        offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        a, b = _lines(a, b, codes, x, s, line_count, ahead, element)
        codes, ahead, x = codes + _LINE * line_count, ahead + _LINE * line_count, x + chunk_bytes(element)
        scales, ahead_scales = scales + 2 * CHUNK, ahead_scales + 2 * CHUNK
    rest = groups - CHUNK * whole
    if rest:
        s = mul(load_first(scales, rest, _FP16), load_first(scales_of(x, element), rest, _F32))
        offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        a, b = _lines(a, b, codes, x, s, (rest + per_line - 1) // per_line, ahead, element)
    return total(add(add(a, b), offsets))
