"""Dot products of matrix rows with one or four vectors: the inner loops for experts with few pairs in float formats.

All operands are addresses: rows of n stored elements, vectors of n fp32. Each (row, vector) pair is summed in an order
that depends on n alone, so a result depends neither on its neighbours in the tile nor on the number of threads.
`ahead` is where the memory lies that will be needed some microseconds later, as long as the tile's rows.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import helper, inner
from moebius.kernels.numba.memory import size_of
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, prefetch, total, zeros

_F32 = np.float32(0)
_LINE = 64  # bytes of a cache line


@helper
def _prefetch(address, nbytes):  # type: ignore[no-untyped-def]
    for offset in range(0, nbytes, _LINE):
        prefetch(address + offset)


@helper
def dot1x1(w, x, n, ahead, element):  # type: ignore[no-untyped-def]
    """One row, one vector: a single stream from memory, four sums to hide the latency of fma.

    On one core of a Zen 5: 38 GB/s of bf16 rows, against 28 with four rows at once and 22 without prefetch.
    """
    size, step = size_of(element), 4 * LANES
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    unrolled, whole = n - n % step, n - n % LANES
    for k in range(0, unrolled, step):
        v, y = w + size * k, x + 4 * k
        _prefetch(ahead + size * k, size * step)
        a0 = fma(load(v, element), load(y, _F32), a0)
        a1 = fma(load(v + size * LANES, element), load(y + 4 * LANES, _F32), a1)
        a2 = fma(load(v + 2 * size * LANES, element), load(y + 8 * LANES, _F32), a2)
        a3 = fma(load(v + 3 * size * LANES, element), load(y + 12 * LANES, _F32), a3)
    for k in range(unrolled, whole, LANES):
        a0 = fma(load(w + size * k, element), load(x + 4 * k, _F32), a0)
    if whole < n:
        rest = n - whole
        a0 = fma(load_first(w + size * whole, rest, element), load_first(x + 4 * whole, rest, _F32), a0)
    return total(add(add(a0, a1), add(a2, a3)))


@inner
def _step2x4(a, w0, w1, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    a00, a01, a02, a03, a10, a11, a12, a13 = a
    a00, a01, a02, a03 = fma(w0, x0, a00), fma(w0, x1, a01), fma(w0, x2, a02), fma(w0, x3, a03)
    a10, a11, a12, a13 = fma(w1, x0, a10), fma(w1, x1, a11), fma(w1, x2, a12), fma(w1, x3, a13)
    return a00, a01, a02, a03, a10, a11, a12, a13


@helper
def dot2x4(w0, w1, x0, x1, x2, x3, n, ahead, element):  # type: ignore[no-untyped-def]
    """Two rows, four vectors: still bound by memory. Result 4 * i + j is row i times vector j."""
    size, z = size_of(element), zeros()
    a = (z, z, z, z, z, z, z, z)
    whole = n - n % LANES
    for k in range(0, whole, LANES):
        _prefetch(ahead + 2 * size * k, 2 * size * LANES)
        a = _step2x4(
            a, load(w0 + size * k, element), load(w1 + size * k, element),
            load(x0 + 4 * k, _F32), load(x1 + 4 * k, _F32), load(x2 + 4 * k, _F32), load(x3 + 4 * k, _F32),
        )  # fmt: skip
    if whole < n:
        k, rest = whole, n - whole
        a = _step2x4(
            a, load_first(w0 + size * k, rest, element), load_first(w1 + size * k, rest, element),
            load_first(x0 + 4 * k, rest, _F32), load_first(x1 + 4 * k, rest, _F32),
            load_first(x2 + 4 * k, rest, _F32), load_first(x3 + 4 * k, rest, _F32),
        )  # fmt: skip
    b00, b01, b02, b03, b10, b11, b12, b13 = a
    return total(b00), total(b01), total(b02), total(b03), total(b10), total(b11), total(b12), total(b13)
