"""Experts in the float formats on any processor: fp32 arithmetic on weights as they are stored."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.bfloats import is_bf16, multiplies_pairs, store_bf16
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import peek, poke, reserve, size_of, widen
from moebius.kernels.numba.simd import LANES, load, store, store_fours
from moebius.kernels.numba.tiles import dot1x1, dot2x4, dot4x4
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

GROUP = 4  # pairs that pass over a block of rows together
_PITCH = 4 * 2 * ROWS  # bytes between the pairs of a group in a block's results
_BLOCK = _PITCH * GROUP
# Bytes between the memory in use and the memory asked for. On a Zen 5: 33 GB/s at 512, 38 at 4096, 37 at 8192.
_AHEAD = 4096
BF16 = 1  # the kind of inputs in bf16; 0 is fp32, 2 fp16
_F32, _BITS = np.float32(0), np.uint16(0)


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
def expand(job, layer, active, start, element):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate, for all its pairs."""
    expert = entry_of(word(job, words.EXPERTS), active)
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    hidden, stop = word(layer, words.HIDDEN), min(start + ROWS, word(layer, words.INTERMEDIATE))
    skip, in_bf16 = start * hidden * size_of(element), _in_bf16(job, end - begin, element)
    gate, up = part(layer, words.GATE, expert), part(layer, words.UP, expert) + skip
    first, second, result = reserve(_BLOCK), reserve(_BLOCK), reserve(_PITCH)
    for pair in range(begin, end, GROUP):
        x = _vectors(job, pair, end, False, in_bf16)
        if gate:
            multiply(gate + skip, up, stop - start, hidden, x, end - begin, in_bf16, first, element)
            multiply(up, up, stop - start, hidden, x, end - begin, in_bf16, second, element)
        else:
            multiply(up, up, stop - start, hidden, x, end - begin, in_bf16, first, element)
        for j in range(min(GROUP, end - pair)):
            inner = inner_of(job, pair + j)
            target = result if in_bf16 else inner + 4 * start
            activate(layer, expert, start, stop, first + j * _PITCH, second + j * _PITCH, target, element)
            if in_bf16:
                for row in range(start, stop, LANES):  # INNER_BYTES leaves room for whole vectors
                    store_bf16(inner + 2 * row, load(result + 4 * (row - start), _F32))


@helper
def _in_bf16(job, pairs, element):  # type: ignore[no-untyped-def]
    """Whether an expert's inputs and intermediates are multiplied in bf16: both are then no worse than in torch."""
    return multiplies_pairs() and pairs > GROUP and is_bf16(element) and word(job, words.SOURCE_KIND) == BF16


@helper
def _vectors(job, pair, end, inner, in_bf16):  # type: ignore[no-untyped-def]
    """Addresses of the inputs (intermediates) of four pairs; the last one again past the end."""
    p1, p2, p3 = min(pair + 1, end - 1), min(pair + 2, end - 1), min(pair + 3, end - 1)
    if inner:
        return inner_of(job, pair), inner_of(job, p1), inner_of(job, p2), inner_of(job, p3)
    if in_bf16:
        return source_of(job, pair), source_of(job, p1), source_of(job, p2), source_of(job, p3)
    return input_of(job, pair), input_of(job, p1), input_of(job, p2), input_of(job, p3)


@helper
def multiply(matrix, after, rows, n, x, pairs, in_bf16, target, element):  # type: ignore[no-untyped-def]
    """The rows from `matrix` on times four vectors of n, into fp32 rows at `target`, `_PITCH` bytes apart.

    `pairs`, the number of pairs of the expert, alone decides which tile is used. `after` is what will be read next.
    """
    x0, x1, x2, x3 = x
    row_bytes = n * size_of(element)
    leap = (_AHEAD + row_bytes - 1) // row_bytes  # rows
    if pairs == 1:
        for row in range(rows):
            ahead = matrix + (row + leap) * row_bytes if row + leap < rows else after + (row + leap - rows) * row_bytes
            poke(target + 4 * row, dot1x1(matrix + row * row_bytes, x0, n, ahead, element))
    elif pairs <= GROUP:
        for row in range(0, rows, 2):
            w0, w1 = matrix + row * row_bytes, matrix + min(row + 1, rows - 1) * row_bytes
            ahead = w0 + leap * row_bytes if row + leap < rows else after + (row + leap - rows) * row_bytes
            y = dot2x4(w0, w1, x0, x1, x2, x3, n, ahead, element)
            for j in range(GROUP):
                poke(target + j * _PITCH + 4 * row, y[j])
                poke(target + j * _PITCH + 4 * min(row + 1, rows - 1), y[4 + j])
    else:
        for row in range(0, rows, 4):
            r1, r2, r3 = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
            w0, w1 = matrix + row * row_bytes, matrix + r1 * row_bytes
            w2, w3 = matrix + r2 * row_bytes, matrix + r3 * row_bytes
            ahead = w0 + 4 * row_bytes if row + 4 < rows else after
            if in_bf16:
                z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, ahead, element, _BITS)
            else:
                z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, ahead, element, _F32)
            store_fours(target + 4 * row, _PITCH, z)  # rows come in fours, and `target` has room for them


@helper
def contract(job, layer, start, columns, element):  # type: ignore[no-untyped-def]
    """Output columns start..start + columns of all experts and pairs, in ascending order of experts."""
    stop, n = min(start + columns, word(layer, words.HIDDEN)), word(layer, words.INTERMEDIATE)
    skip = start * n * size_of(element)
    experts, offsets, active = word(job, words.EXPERTS), word(job, words.OFFSETS), word(job, words.ACTIVE)
    y = reserve(_BLOCK)
    for i in range(active):
        expert, begin, end = entry_of(experts, i), entry_of(offsets, i), entry_of(offsets, i + 1)
        matrix = part(layer, words.DOWN, expert) + skip
        after = part(layer, words.DOWN, entry_of(experts, min(i + 1, active - 1))) + skip
        in_bf16 = _in_bf16(job, end - begin, element)
        for pair in range(begin, end, GROUP):
            x = _vectors(job, pair, end, True, in_bf16)
            multiply(matrix, after, stop - start, n, x, end - begin, in_bf16, y, element)
            for j in range(min(GROUP, end - pair)):
                add_output(job, layer, expert, pair + j, start, stop, y + j * _PITCH, element)


work = make_work(prepare, expand, contract)  # (job, element); `element` tells the weights' type (see `simd`)


@entry("void(int64)", callback=True)
def work_fp32(job):  # type: ignore[no-untyped-def]
    work(job, np.float32(0))


@entry("void(int64)", callback=True)
def work_bf16(job):  # type: ignore[no-untyped-def]
    work(job, np.uint16(0))


@entry("void(int64)", callback=True)
def work_fp16(job):  # type: ignore[no-untyped-def]
    work(job, np.int16(0))
