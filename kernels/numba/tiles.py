"""Dot products of four matrix rows with one or four vectors: the inner loops of the portable kernels.

Every (row, vector) pair sums in one accumulator, lanes in ascending order, so a result does not depend on its
neighbours in the tile, nor on the number of threads.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import size_of
from moebius.kernels.numba.simd import LANES, fma, load, load_first, total, zeros

_F32 = np.float32(0)


@helper
def dot4x1(w0, w1, w2, w3, x, n, element):  # type: ignore[no-untyped-def]
    """Four rows of n stored elements times one fp32 vector; all given by address."""
    size = size_of(element)
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    whole = n - n % LANES
    for k in range(0, whole, LANES):
        v = load(x + 4 * k, _F32)
        a0 = fma(load(w0 + size * k, element), v, a0)
        a1 = fma(load(w1 + size * k, element), v, a1)
        a2 = fma(load(w2 + size * k, element), v, a2)
        a3 = fma(load(w3 + size * k, element), v, a3)
    if whole < n:
        k, rest = whole, n - whole
        v = load_first(x + 4 * k, rest, _F32)
        a0 = fma(load_first(w0 + size * k, rest, element), v, a0)
        a1 = fma(load_first(w1 + size * k, rest, element), v, a1)
        a2 = fma(load_first(w2 + size * k, rest, element), v, a2)
        a3 = fma(load_first(w3 + size * k, rest, element), v, a3)
    return total(a0), total(a1), total(a2), total(a3)


@helper
def _step4x4(a, w0, w1, w2, w3, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    a00, a01, a02, a03, a10, a11, a12, a13, a20, a21, a22, a23, a30, a31, a32, a33 = a
    a00, a01, a02, a03 = fma(w0, x0, a00), fma(w0, x1, a01), fma(w0, x2, a02), fma(w0, x3, a03)
    a10, a11, a12, a13 = fma(w1, x0, a10), fma(w1, x1, a11), fma(w1, x2, a12), fma(w1, x3, a13)
    a20, a21, a22, a23 = fma(w2, x0, a20), fma(w2, x1, a21), fma(w2, x2, a22), fma(w2, x3, a23)
    a30, a31, a32, a33 = fma(w3, x0, a30), fma(w3, x1, a31), fma(w3, x2, a32), fma(w3, x3, a33)
    return a00, a01, a02, a03, a10, a11, a12, a13, a20, a21, a22, a23, a30, a31, a32, a33


@helper
def dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, element):  # type: ignore[no-untyped-def]
    """Four rows times four vectors; result 4 * i + j is row i times vector j."""
    size, z = size_of(element), zeros()
    a = (z, z, z, z, z, z, z, z, z, z, z, z, z, z, z, z)
    whole = n - n % LANES
    for k in range(0, whole, LANES):
        a = _step4x4(
            a,
            load(w0 + size * k, element), load(w1 + size * k, element),
            load(w2 + size * k, element), load(w3 + size * k, element),
            load(x0 + 4 * k, _F32), load(x1 + 4 * k, _F32), load(x2 + 4 * k, _F32), load(x3 + 4 * k, _F32),
        )  # fmt: skip
    if whole < n:
        k, rest = whole, n - whole
        a = _step4x4(
            a,
            load_first(w0 + size * k, rest, element), load_first(w1 + size * k, rest, element),
            load_first(w2 + size * k, rest, element), load_first(w3 + size * k, rest, element),
            load_first(x0 + 4 * k, rest, _F32), load_first(x1 + 4 * k, rest, _F32),
            load_first(x2 + 4 * k, rest, _F32), load_first(x3 + 4 * k, rest, _F32),
        )  # fmt: skip
    b00, b01, b02, b03, b10, b11, b12, b13, b20, b21, b22, b23, b30, b31, b32, b33 = a
    return (
        total(b00), total(b01), total(b02), total(b03), total(b10), total(b11), total(b12), total(b13),
        total(b20), total(b21), total(b22), total(b23), total(b30), total(b31), total(b32), total(b33),
    )  # fmt: skip
