"""The expert MLP for few tokens per expert, on any processor: two phases of independent units of work.

Phase 1 computes the activated intermediate of a block of rows of one expert, for all tokens routed to it; phase 2 a
block of output columns, for all experts and tokens. Threads take units from a shared counter. Each number is computed
by one thread in an order that depends on the routes alone, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.activations import first_factor, second_factor
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import atomic_add, atomic_load, pause, peek, poke, size_of, widen
from moebius.kernels.numba.tiles import dot4x1, dot4x4

# Rows per unit: large enough that taking one (some 50 ns) does not show, small enough to balance 16 threads.
EXPAND_ROWS = 32
CONTRACT_ROWS = 32
_I32, _I64, _F32, _ZERO = np.int32(0), np.int64(0), np.float32(0), np.float32(0)
_W = words.WORD


@helper
def word(base, index):  # type: ignore[no-untyped-def]
    """Word `index` of the layer or job at address `base`."""
    return peek(base + _W * index, _I64)


@helper
def _part(layer, part, expert):  # type: ignore[no-untyped-def]
    """Address of a part of one expert, 0 where there is none."""
    base = word(layer, part)
    return base + expert * word(layer, part + 1) if base else base


@helper
def work(job, element):  # type: ignore[no-untyped-def]
    """Take and compute units until none is left. `element` tells the weights' type (see `simd`)."""
    layer = word(job, words.LAYER)
    blocks = (word(layer, words.INTERMEDIATE) + EXPAND_ROWS - 1) // EXPAND_ROWS
    first_phase = blocks * word(job, words.ACTIVE)
    units = first_phase + (word(layer, words.HIDDEN) + CONTRACT_ROWS - 1) // CONTRACT_ROWS
    while True:
        unit = atomic_add(job + _W * words.NEXT, 1)
        if unit >= units:
            return
        if unit < first_phase:
            _expand(job, layer, unit // blocks, EXPAND_ROWS * (unit % blocks), element)
            atomic_add(job + _W * words.DONE, 1)
        else:
            while atomic_load(job + _W * words.DONE) < first_phase:
                pause()
            _contract(job, layer, CONTRACT_ROWS * (unit - first_phase), element)


@helper
def _expand(job, layer, active, start, element):  # type: ignore[no-untyped-def]
    expert = np.int64(peek(word(job, words.EXPERTS) + 4 * active, _I32))
    begin = np.int64(peek(word(job, words.OFFSETS) + 4 * active, _I32))
    end = np.int64(peek(word(job, words.OFFSETS) + 4 * active + 4, _I32))
    stop = min(start + EXPAND_ROWS, word(layer, words.INTERMEDIATE))
    gate, up = _part(layer, words.GATE, expert), _part(layer, words.UP, expert)
    if gate:
        for row in range(start, stop, 2):
            second = min(row + 1, stop - 1)
            _project(job, layer, gate, gate, up, up, row, second, row, second, begin, end, True, element)
    else:
        for row in range(start, stop, 4):
            r1, r2, r3 = min(row + 1, stop - 1), min(row + 2, stop - 1), min(row + 3, stop - 1)
            _project(job, layer, up, up, up, up, row, r1, r2, r3, begin, end, False, element)
    _activate(job, layer, expert, begin, end, start, stop, element)


@helper
def _project(job, layer, m0, m1, m2, m3, r0, r1, r2, r3, begin, end, gated, element):  # type: ignore[no-untyped-def]
    """Rows r0..r3 of matrices m0..m3 times the inputs of pairs begin..end, into FIRST (gated: r2, r3 into SECOND)."""
    n, stride = word(layer, words.HIDDEN), 4 * word(job, words.STRIDE)
    row_bytes, tokens, x = n * size_of(element), word(job, words.TOKENS), word(job, words.X)
    w0, w1, w2, w3 = m0 + r0 * row_bytes, m1 + r1 * row_bytes, m2 + r2 * row_bytes, m3 + r3 * row_bytes
    first = word(job, words.FIRST)
    second = word(job, words.SECOND) if gated else first
    if end - begin == 1:
        y = dot4x1(w0, w1, w2, w3, x + 4 * n * peek(tokens + 4 * begin, _I32), n, element)
        poke(first + begin * stride + 4 * r0, y[0])
        poke(first + begin * stride + 4 * r1, y[1])
        poke(second + begin * stride + 4 * r2, y[2])
        poke(second + begin * stride + 4 * r3, y[3])
        return
    for p0 in range(begin, end, 4):
        # Past the end, rows and pairs repeat the last one: the same number is written twice to the same place.
        p1, p2, p3 = min(p0 + 1, end - 1), min(p0 + 2, end - 1), min(p0 + 3, end - 1)
        x0, x1 = x + 4 * n * peek(tokens + 4 * p0, _I32), x + 4 * n * peek(tokens + 4 * p1, _I32)
        x2, x3 = x + 4 * n * peek(tokens + 4 * p2, _I32), x + 4 * n * peek(tokens + 4 * p3, _I32)
        z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, element)
        for j in range(min(4, end - p0)):
            offset = (p0 + j) * stride
            poke(first + offset + 4 * r0, z[j])
            poke(first + offset + 4 * r1, z[4 + j])
            poke(second + offset + 4 * r2, z[8 + j])
            poke(second + offset + 4 * r3, z[12 + j])


@helper
def _activate(job, layer, expert, begin, end, start, stop, element):  # type: ignore[no-untyped-def]
    """Biases and the activation on rows start..stop of pairs begin..end; the result replaces FIRST."""
    gated = word(layer, words.GATE) != 0
    kind, stride = word(layer, words.KIND), 4 * word(job, words.STRIDE)
    alpha, gate_max = peek(layer + _W * words.ALPHA, _F32), peek(layer + _W * words.GATE_MAX, _F32)
    act_max, up_max = peek(layer + _W * words.ACT_MAX, _F32), peek(layer + _W * words.UP_MAX, _F32)
    up_shift = peek(layer + _W * words.UP_SHIFT, _F32)
    up_bias = _part(layer, words.UP_BIAS, expert)
    first_bias = _part(layer, words.GATE_BIAS, expert) if gated else up_bias
    for pair in range(begin, end):
        first, second = word(job, words.FIRST) + pair * stride, word(job, words.SECOND) + pair * stride
        for row in range(start, stop):
            value = peek(first + 4 * row, _F32) + _element(first_bias, row, element)
            value = first_factor(kind, alpha, gate_max, act_max, value)
            if gated:
                up = peek(second + 4 * row, _F32) + _element(up_bias, row, element)
                value *= second_factor(kind, up_max, up_shift, up)
            poke(first + 4 * row, value)


@helper
def _element(part, index, element):  # type: ignore[no-untyped-def]
    """One element of a bias as fp32; 0 where there is none."""
    return widen(peek(part + size_of(element) * index, element)) if part else _ZERO


@helper
def _contract(job, layer, start, element):  # type: ignore[no-untyped-def]
    """Output columns start..start + CONTRACT_ROWS of all experts and pairs."""
    stop = min(start + CONTRACT_ROWS, word(layer, words.HIDDEN))
    for active in range(word(job, words.ACTIVE)):
        expert = np.int64(peek(word(job, words.EXPERTS) + 4 * active, _I32))
        begin = np.int64(peek(word(job, words.OFFSETS) + 4 * active, _I32))
        end = np.int64(peek(word(job, words.OFFSETS) + 4 * active + 4, _I32))
        for row in range(start, stop, 4):
            _accumulate(job, layer, expert, begin, end, row, stop, element)


@helper
def _accumulate(job, layer, expert, begin, end, row, stop, element):  # type: ignore[no-untyped-def]
    """Add up to four output columns from `row` on of one expert, for its pairs begin..end."""
    n, stride = word(layer, words.INTERMEDIATE), 4 * word(job, words.STRIDE)
    row_bytes, down = n * size_of(element), _part(layer, words.DOWN, expert)
    r1, r2, r3 = min(row + 1, stop - 1), min(row + 2, stop - 1), min(row + 3, stop - 1)
    w0, w1, w2, w3 = down + row * row_bytes, down + r1 * row_bytes, down + r2 * row_bytes, down + r3 * row_bytes
    a = word(job, words.FIRST)
    if end - begin == 1:
        y = dot4x1(w0, w1, w2, w3, a + begin * stride, n, element)
        for i in range(min(4, stop - row)):
            _add(job, layer, expert, begin, row + i, y[i], element)
        return
    for p0 in range(begin, end, 4):
        p1, p2, p3 = min(p0 + 1, end - 1), min(p0 + 2, end - 1), min(p0 + 3, end - 1)
        x0, x1, x2, x3 = a + p0 * stride, a + p1 * stride, a + p2 * stride, a + p3 * stride
        z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, element)
        for i in range(min(4, stop - row)):
            for j in range(min(4, end - p0)):
                _add(job, layer, expert, p0 + j, row + i, z[4 * i + j], element)


@helper
def _add(job, layer, expert, pair, column, y, element):  # type: ignore[no-untyped-def]
    token = np.int64(peek(word(job, words.TOKENS) + 4 * pair, _I32))
    weight = peek(word(job, words.WEIGHTS) + 4 * pair, _F32)
    target = word(job, words.OUT) + 4 * (token * word(layer, words.HIDDEN) + column)
    bias = _element(_part(layer, words.DOWN_BIAS, expert), column, element)
    poke(target, peek(target, _F32) + weight * (y + bias))


@entry("void(int64)", callback=True)
def work_fp32(job):  # type: ignore[no-untyped-def]
    work(job, np.float32(0))


@entry("void(int64)", callback=True)
def work_bf16(job):  # type: ignore[no-untyped-def]
    work(job, np.uint16(0))


@entry("void(int64)", callback=True)
def work_fp16(job):  # type: ignore[no-untyped-def]
    work(job, np.int16(0))
