"""A few vectors times one matrix, at the speed of memory: for dense layers, beside the experts."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import atomic_add, peek, poke, reserve, size_of
from moebius.kernels.numba.portable import FEW, multiply
from moebius.kernels.numba.units import ROWS, word

# Words of a job: the next unit, alone on its cache line; then addresses and numbers.
NEXT, MATRIX, X, OUT, ROW_COUNT, N, VECTORS, WORDS = 0, 8, 9, 10, 11, 12, 13, 14
_BLOCK = 4 * ROWS * FEW
_F32 = np.float32(0)


@helper
def _multiply(job, element):  # type: ignore[no-untyped-def]
    """Units of `ROWS` rows until none is left; the next is taken early, so that it can be asked for at the end."""
    rows, start = word(job, ROW_COUNT), ROWS * atomic_add(job, 1)
    while start < rows:
        then = ROWS * atomic_add(job, 1)
        _unit(job, start, min(start + ROWS, rows), then if then < rows else start, element)
        start = then


@helper
def _unit(job, start, stop, then, element):  # type: ignore[no-untyped-def]
    """Rows start..stop for all vectors, four at a time: the rows come from memory once."""
    n, vectors, y = word(job, N), word(job, VECTORS), reserve(_BLOCK)
    row_bytes = n * size_of(element)
    block = word(job, MATRIX) + start * row_bytes
    for first in range(0, vectors, FEW):
        count, x = min(FEW, vectors - first), word(job, X) + 4 * n * first
        last = count - 1
        four = x, x + 4 * n * min(1, last), x + 4 * n * min(2, last), x + 4 * n * min(3, last)
        after = word(job, MATRIX) + then * row_bytes if first + FEW >= vectors else block
        multiply(block, after, stop - start, n, four, count, y, element)
        for j in range(count):
            _copy(y + 4 * ROWS * j, word(job, OUT) + 4 * (word(job, ROW_COUNT) * (first + j) + start), stop - start)


@helper
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        poke(target + 4 * i, peek(source + 4 * i, _F32))


@entry("void(int64)", callback=True)
def linear_fp32(job):  # type: ignore[no-untyped-def]
    _multiply(job, np.float32(0))


@entry("void(int64)", callback=True)
def linear_bf16(job):  # type: ignore[no-untyped-def]
    _multiply(job, np.uint16(0))


@entry("void(int64)", callback=True)
def linear_fp16(job):  # type: ignore[no-untyped-def]
    _multiply(job, np.int16(0))
