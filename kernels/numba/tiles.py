"""Dot products of matrix rows with one or four vectors: the inner loops for experts with few pairs in float formats.

All operands are addresses: rows of n stored elements, vectors of n fp32. Each (row, vector) pair is summed in an order
that depends on n alone, so a result depends neither on its neighbours nor on the number of threads.
`ahead` is where the memory lies that will be needed some microseconds later, as long as the row.
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
def _step1x4(a, w, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    a0, a1, a2, a3 = a
    return fma(w, x0, a0), fma(w, x1, a1), fma(w, x2, a2), fma(w, x3, a3)


@helper
def dot1x4(w, x0, x1, x2, x3, n, ahead, element):  # type: ignore[no-untyped-def]
    """One row, four vectors, two sums each: with two rows at once they and the vectors crowd the first-level cache.

    On two cores of a Zen 5: 42 GB/s of bf16 rows, where a plain read gets 43 and two rows at once 38.
    """
    size, step, z = size_of(element), 2 * LANES, zeros()
    a, b = (z, z, z, z), (z, z, z, z)
    unrolled = n - n % step
    for k in range(0, unrolled, step):
        j = k + LANES
        _prefetch(ahead + size * k, size * step)
        a = _step1x4(
            a, load(w + size * k, element),
            load(x0 + 4 * k, _F32), load(x1 + 4 * k, _F32), load(x2 + 4 * k, _F32), load(x3 + 4 * k, _F32),
        )  # fmt: skip
        b = _step1x4(
            b, load(w + size * j, element),
            load(x0 + 4 * j, _F32), load(x1 + 4 * j, _F32), load(x2 + 4 * j, _F32), load(x3 + 4 * j, _F32),
        )  # fmt: skip
    for k in range(unrolled, n, LANES):
        rest = min(n - k, LANES)
        a = _step1x4(
            a, load_first(w + size * k, rest, element),
            load_first(x0 + 4 * k, rest, _F32), load_first(x1 + 4 * k, rest, _F32),
            load_first(x2 + 4 * k, rest, _F32), load_first(x3 + 4 * k, rest, _F32),
        )  # fmt: skip
    (a0, a1, a2, a3), (b0, b1, b2, b3) = a, b
    return total(add(a0, b0)), total(add(a1, b1)), total(add(a2, b2)), total(add(a3, b3))
