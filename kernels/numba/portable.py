"""Experts in the float formats with few pairs: fp32 arithmetic on weights as they are stored."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import peek, poke, reserve, size_of, widen
from moebius.kernels.numba.simd import LANES, load, store
from moebius.kernels.numba.tiles import dot1x1, dot1x4
from moebius.kernels.numba.units import ROWS, activate, add_output, entry_of, inner_of, input_of, part, slot_of, word

FEW = 4  # pairs that pass over a block of rows together
_PITCH = 4 * ROWS  # bytes between the pairs in a block's results
_BLOCK = _PITCH * FEW
# Bytes between the memory in use and the memory asked for. On a Zen 5: 33 GB/s at 512, 38 at 4096, 37 at 8192.
_AHEAD = 4096
BF16 = 1  # the kind of inputs in bf16; 0 is fp32, 2 fp16
_F32 = np.float32(0)


@helper
def prepare(job, layer, token, element):  # type: ignore[no-untyped-def]
    """Widen one token's input to fp32."""
    n, target = word(layer, words.HIDDEN), word(job, words.X) + token * word(job, words.X_BYTES)
    source = word(job, words.SOURCE)
    if word(job, words.SOURCE_KIND) == BF16:
        _widen(source + 2 * n * token, target, n, np.uint16(0))
    else:
        _widen(source + 2 * n * token, target, n, np.int16(0))


@helper
def _widen(source, target, count, element):  # type: ignore[no-untyped-def]
    whole = count - count % LANES
    for k in range(0, whole, LANES):
        store(target + 4 * k, load(source + size_of(element) * k, element))
    for k in range(whole, count):
        poke(target + 4 * k, widen(peek(source + size_of(element) * k, element)))


@helper
def expand(job, layer, active, start, then, element, bias):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    hidden, stop = word(layer, words.HIDDEN), min(start + ROWS, word(layer, words.INTERMEDIATE))
    row_bytes, gated = hidden * size_of(element), word(layer, words.GATE) != 0
    lead = words.GATE if gated else words.UP
    up, after = part(layer, words.UP, expert) + start * row_bytes, part(layer, lead, after) + then[1] * row_bytes
    first, second = reserve(_BLOCK), reserve(_BLOCK)
    p1, p2, p3 = min(begin + 1, end - 1), min(begin + 2, end - 1), min(begin + 3, end - 1)
    x = input_of(job, begin), input_of(job, p1), input_of(job, p2), input_of(job, p3)
    if gated:
        gate = part(layer, words.GATE, expert) + start * row_bytes
        multiply(gate, up, stop - start, hidden, x, end - begin, first, element)
        multiply(up, after, stop - start, hidden, x, end - begin, second, element)
    else:
        multiply(up, after, stop - start, hidden, x, end - begin, first, element)
    for j in range(end - begin):
        target = inner_of(job, slot_of(job, active) + j) + 4 * start
        activate(layer, expert, start, stop, first + j * _PITCH, second + j * _PITCH, target, bias)


@helper
def contract(job, layer, active, start, stop, then, element, bias):  # type: ignore[no-untyped-def]
    """Output columns start..stop of one expert and its pairs."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, slot, y = word(layer, words.INTERMEDIATE), slot_of(job, active), reserve(_BLOCK)
    row_bytes, last = n * size_of(element), end - begin - 1
    x0, x1 = inner_of(job, slot), inner_of(job, slot + min(1, last))
    x = x0, x1, inner_of(job, slot + min(2, last)), inner_of(job, slot + min(3, last))
    for row in range(start, stop, ROWS):
        rows, matrix = min(ROWS, stop - row), part(layer, words.DOWN, expert) + row * row_bytes
        following = matrix + rows * row_bytes
        if row + ROWS >= stop:
            following = part(layer, words.DOWN, after) + then[1] * row_bytes
        multiply(matrix, following, rows, n, x, end - begin, y, element)
        for j in range(end - begin):
            add_output(job, layer, expert, begin + j, row, row + rows, y + j * _PITCH, bias)


@helper
def multiply(matrix, after, rows, n, x, pairs, target, element):  # type: ignore[no-untyped-def]
    """The rows from `matrix` on times up to four vectors of n, into fp32 rows at `target`, `_PITCH` bytes apart.

    `pairs`, the number of pairs of the expert, decides which loop is used. `after` is what will be read next.
    """
    x0, x1, x2, x3 = x
    row_bytes = n * size_of(element)
    leap = (_AHEAD + row_bytes - 1) // row_bytes  # rows
    for row in range(rows):
        w = matrix + row * row_bytes
        ahead = w + leap * row_bytes if row + leap < rows else after + (row + leap - rows) * row_bytes
        if pairs == 1:
            poke(target + 4 * row, dot1x1(w, x0, n, ahead, element))
        else:
            y = dot1x4(w, x0, x1, x2, x3, n, ahead, element)
            for j in range(FEW):
                poke(target + j * _PITCH + 4 * row, y[j])
