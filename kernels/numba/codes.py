"""A row of codes times a vector of quantised activations (see `groups`).

Products are exact in int32 within a group; the groups are summed in fp32, in an order that depends on the row's length
alone. Addresses in, no checks; loads may pass the end of a matrix of codes by less than 64 bytes, which the scales
behind it in the record cover.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.decoding import group_bytes, load_exponents
from moebius.kernels.numba.groups import CHUNK, chunk_bytes, scales_of
from moebius.kernels.numba.integers import (
    add_ints,
    dot_bytes,
    dot_words,
    floats,
    high_halves,
    high_words,
    load_bytes,
    load_ints,
    low_halves,
    low_words,
    no_ints,
    planes,
    second_eight,
    spread,
    times_256,
)
from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.simd import add, fma, load, load_first, mul, prefetch, total, zeros

_F32, _FP16 = np.float32(0), np.int16(0)
_LINE = 64


@helper
def scale_bytes(element):  # type: ignore[no-untyped-def]
    """Bytes of a group's scale: an exponent beside e2m1, fp16 beside integers."""
    return 1 if planes(element) == 2 else 2


@inner
def load_scales(address, count, element):  # type: ignore[no-untyped-def]
    """The scales of up to sixteen groups, zeros where there are no more."""
    if scale_bytes(element) == 1:
        return load_exponents(address, count)
    return load(address, _FP16) if count >= CHUNK else load_first(address, count, _FP16)


@inner
def _product(codes, x, element):  # type: ignore[no-untyped-def]
    """64 bytes of codes times the activations that belong to them, summed within groups."""
    w = load_bytes(codes)
    if planes(element) == 0:
        first = dot_words(low_words(w), load_bytes(x))
        return floats(add_ints(first, dot_words(high_words(w), load_bytes(x + _LINE))))
    low, high = low_halves(w, element), high_halves(w, element)
    sums = dot_bytes(no_ints(), low, high, load_bytes(x), load_bytes(x + _LINE))
    if planes(element) == 2:
        sums = dot_bytes(times_256(sums), low, high, load_bytes(x + 2 * _LINE), load_bytes(x + 3 * _LINE))
    return floats(sums)


@inner
def _four_lines(a, b, codes, x, scales, count, ahead, element):  # type: ignore[no-untyped-def]
    """The products of up to four lines of codes, each times the scales of its groups, added to two sums in turn."""
    step = 4 * _LINE if planes(element) == 2 else 2 * _LINE  # bytes of x beside a line
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
    """As `_four_lines`, of all lines of a chunk: four of four-bit codes, eight of int8."""
    a, b = _four_lines(a, b, codes, x, scales, count, ahead, element)
    if count > 4:
        codes, x, ahead = codes + 4 * _LINE, x + 8 * _LINE, ahead + 4 * _LINE
        a, b = _four_lines(a, b, codes, x, second_eight(scales), count - 4, ahead, element)
    return a, b


@helper
def dot(codes, scales, x, groups, ahead, ahead_scales, element):  # type: ignore[no-untyped-def]
    """One row times one vector. `ahead` and `ahead_scales` are what will be read some rows later, as long as this."""
    a, b, offsets = zeros(), zeros(), zeros()
    per_line = _LINE // group_bytes(element)  # groups
    whole, line_count = groups // CHUNK, CHUNK // per_line
    for _ in range(whole):
        prefetch(ahead_scales)
        s = mul(load_scales(scales, CHUNK, element), load(scales_of(x, element), _F32))
        if planes(element):
            offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        a, b = _lines(a, b, codes, x, s, line_count, ahead, element)
        codes, ahead, x = codes + _LINE * line_count, ahead + _LINE * line_count, x + chunk_bytes(element)
        scales += scale_bytes(element) * CHUNK
        ahead_scales += scale_bytes(element) * CHUNK
    rest = groups - CHUNK * whole
    if rest:
        s = mul(load_scales(scales, rest, element), load_first(scales_of(x, element), rest, _F32))
        if planes(element):
            offsets = fma(s, floats(load_ints(scales_of(x, element) + _LINE)), offsets)
        a, b = _lines(a, b, codes, x, s, (rest + per_line - 1) // per_line, ahead, element)
    return total(add(add(a, b), offsets))
