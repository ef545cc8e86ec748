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
    spread,
    times_256,
)
from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.memory import reserve
from moebius.kernels.numba.simd import add, fma, load, load_first, mul, prefetch, store, total, zeros

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
