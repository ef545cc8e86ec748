"""The expert MLP on any processor: two phases of independent units of work.

Phase 1 computes the activated intermediate of a block of rows of one expert, for all tokens routed to it; phase 2 a
block of output columns, for all experts and tokens. Threads take units from a shared counter. Each number is computed
by one thread in an order that depends on the routes alone, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.experts import Act
from moebius.kernels.numba import words
from moebius.kernels.numba.activations import clamp_lanes, first_factor, second_factor, silu_lanes
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import atomic_add, atomic_load, peek, poke, reserve, size_of, wait_briefly, widen
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, mul, splat, store, zeros
from moebius.kernels.numba.tiles import dot1x1, dot2x4, dot4x4

# Rows per unit: large enough that taking one (some 50 ns) does not show, small enough to balance 16 threads, and a
# block of bf16 rows stays in the second-level cache while groups of four pairs pass over it.
ROWS = 32
GROUP = 4  # pairs that pass over a block of rows together
_PITCH = 4 * 2 * ROWS  # bytes between the pairs of a group in a block's results
_BLOCK = _PITCH * GROUP
# Bytes between the memory in use and the memory asked for. On a Zen 5: 33 GB/s at 512, 38 at 4096, 37 at 8192.
_AHEAD = 4096
_I32, _I64, _F32, _ZERO = np.int32(0), np.int64(0), np.float32(0), np.float32(0)
_W = words.WORD
_SILU = int(Act.SILU)


@helper
def word(base, index):  # type: ignore[no-untyped-def]
    """Word `index` of the layer or job at address `base`."""
    return peek(base + _W * index, _I64)


@helper
def number(layer, index):  # type: ignore[no-untyped-def]
    """The fp32 in word `index` of a layer."""
    return peek(layer + _W * index, _F32)


@helper
def part(layer, index, expert):  # type: ignore[no-untyped-def]
    """Address of a part of one expert, 0 where there is none."""
    base = word(layer, index)
    return base + expert * word(layer, index + 1) if base else base


@helper
def entry_of(array, index):  # type: ignore[no-untyped-def]
    """Element of an int32 array given by address."""
    return np.int64(peek(array + 4 * index, _I32))


@helper
def work(job, element):  # type: ignore[no-untyped-def]
    """Take and compute units until none is left. `element` tells the weights' type (see `simd`)."""
    layer = word(job, words.LAYER)
    blocks = (word(layer, words.INTERMEDIATE) + ROWS - 1) // ROWS
    expansions = blocks * word(job, words.ACTIVE)
    columns = _columns(job)
    units = expansions + (word(layer, words.HIDDEN) + columns - 1) // columns
    while True:
        unit = atomic_add(job + _W * words.NEXT, 1)
        if unit >= units:
            return
        if unit < expansions:
            expand(job, layer, unit // blocks, ROWS * (unit % blocks), element)
            atomic_add(job + _W * words.DONE, 1)
        else:
            waited = 0
            while atomic_load(job + _W * words.DONE) < expansions:
                waited = wait_briefly(waited)
            contract(job, layer, columns * (unit - expansions), columns, element)


@helper
def _columns(job):  # type: ignore[no-untyped-def]
    """Output columns per unit: twice as many where arithmetic is the limit, since each unit reads all intermediates."""
    active = word(job, words.ACTIVE)
    return 2 * ROWS if entry_of(word(job, words.OFFSETS), active) >= 16 * active else ROWS


@helper
def expand(job, layer, active, start, element):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate, for all its pairs."""
    expert = entry_of(word(job, words.EXPERTS), active)
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    hidden, stop = word(layer, words.HIDDEN), min(start + ROWS, word(layer, words.INTERMEDIATE))
    skip = start * hidden * size_of(element)
    gate, up = part(layer, words.GATE, expert), part(layer, words.UP, expert) + skip
    x, tokens = word(job, words.X), word(job, words.TOKENS)
    first, second = reserve(_BLOCK), reserve(_BLOCK)
    for pair in range(begin, end, GROUP):
        x0, x1, x2, x3 = _inputs(x, tokens, 4 * hidden, pair, end)
        if gate:
            multiply(gate + skip, up, stop - start, hidden, x0, x1, x2, x3, end - begin, first, element)
            multiply(up, up, stop - start, hidden, x0, x1, x2, x3, end - begin, second, element)
        else:
            multiply(up, up, stop - start, hidden, x0, x1, x2, x3, end - begin, first, element)
        activate(job, layer, expert, pair, min(GROUP, end - pair), start, stop, first, second, element)


@helper
def _inputs(x, tokens, row_bytes, pair, end):  # type: ignore[no-untyped-def]
    """Input rows of four pairs; the last one again past the end."""
    return (
        x + row_bytes * entry_of(tokens, pair),
        x + row_bytes * entry_of(tokens, min(pair + 1, end - 1)),
        x + row_bytes * entry_of(tokens, min(pair + 2, end - 1)),
        x + row_bytes * entry_of(tokens, min(pair + 3, end - 1)),
    )


@helper
def multiply(matrix, after, rows, n, x0, x1, x2, x3, pairs, target, element):  # type: ignore[no-untyped-def]
    """The rows from `matrix` on times four vectors of n, into fp32 rows at `target`, `_PITCH` bytes apart.

    `pairs`, the number of pairs of the expert, alone decides which tile is used. `after` is what will be read next.
    """
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
            z = dot4x4(w0, w1, w2, w3, x0, x1, x2, x3, n, ahead, element)
            for j in range(GROUP):
                poke(target + j * _PITCH + 4 * row, z[j])
                poke(target + j * _PITCH + 4 * r1, z[4 + j])
                poke(target + j * _PITCH + 4 * r2, z[8 + j])
                poke(target + j * _PITCH + 4 * r3, z[12 + j])


@helper
def activate(job, layer, expert, pair, pairs, start, stop, first, second, element):  # type: ignore[no-untyped-def]
    """Biases and the activation on a block's results, into the rows start..stop of the job's intermediate."""
    stride = 4 * word(job, words.STRIDE)
    up_bias = part(layer, words.UP_BIAS, expert)
    first_bias = part(layer, words.GATE_BIAS, expert) if word(layer, words.GATE) else up_bias
    for j in range(pairs):
        target, skip = word(job, words.INNER) + (pair + j) * stride, j * _PITCH
        if word(layer, words.KIND) == _SILU:
            for row in range(start, stop, LANES):
                offset, count = skip + 4 * (row - start), stop - row
                g = add(load(first + offset, _F32), bias_lanes(first_bias, row, count, element))
                u = add(load(second + offset, _F32), bias_lanes(up_bias, row, count, element))
                store(target + 4 * row, _silu(layer, g, u))  # STRIDE leaves room for whole vectors
        else:
            for row in range(start, stop):
                offset = skip + 4 * (row - start)
                g = peek(first + offset, _F32) + bias_at(first_bias, row, element)
                u = peek(second + offset, _F32) + bias_at(up_bias, row, element)
                poke(target + 4 * row, _generic(layer, g, u))


@helper
def _silu(layer, g, u):  # type: ignore[no-untyped-def]
    alpha, gate_max = splat(number(layer, words.ALPHA)), splat(number(layer, words.GATE_MAX))
    result = silu_lanes(alpha, gate_max, splat(number(layer, words.ACT_MAX)), g)
    if word(layer, words.GATE):
        up_max, up_shift = splat(number(layer, words.UP_MAX)), splat(number(layer, words.UP_SHIFT))
        result = mul(result, clamp_lanes(up_max, up_shift, u))
    return result


@helper
def _generic(layer, g, u):  # type: ignore[no-untyped-def]
    kind, alpha, gate_max = word(layer, words.KIND), number(layer, words.ALPHA), number(layer, words.GATE_MAX)
    result = first_factor(kind, alpha, gate_max, number(layer, words.ACT_MAX), g)
    if word(layer, words.GATE):
        result *= second_factor(kind, number(layer, words.UP_MAX), number(layer, words.UP_SHIFT), u)
    return result


@helper
def bias_lanes(bias, index, count, element):  # type: ignore[no-untyped-def]
    """Sixteen elements of a bias, of which `count` exist; zeros where there is none."""
    if not bias:
        return zeros()
    address = bias + size_of(element) * index
    return load(address, element) if count >= LANES else load_first(address, count, element)


@helper
def bias_at(bias, index, element):  # type: ignore[no-untyped-def]
    """One element of a bias as fp32; 0 where there is none."""
    return widen(peek(bias + size_of(element) * index, element)) if bias else _ZERO


@helper
def contract(job, layer, start, columns, element):  # type: ignore[no-untyped-def]
    """Output columns start..start + columns of all experts and pairs, in ascending order of experts."""
    stop, n = min(start + columns, word(layer, words.HIDDEN)), word(layer, words.INTERMEDIATE)
    skip, stride = start * n * size_of(element), 4 * word(job, words.STRIDE)
    experts, offsets, active = word(job, words.EXPERTS), word(job, words.OFFSETS), word(job, words.ACTIVE)
    y = reserve(_BLOCK)
    for i in range(active):
        expert, begin, end = entry_of(experts, i), entry_of(offsets, i), entry_of(offsets, i + 1)
        matrix = part(layer, words.DOWN, expert) + skip
        after = part(layer, words.DOWN, entry_of(experts, min(i + 1, active - 1))) + skip
        for pair in range(begin, end, GROUP):
            x0 = word(job, words.INNER) + pair * stride
            x1, x2 = x0 + min(1, end - 1 - pair) * stride, x0 + min(2, end - 1 - pair) * stride
            x3 = x0 + min(3, end - 1 - pair) * stride
            multiply(matrix, after, stop - start, n, x0, x1, x2, x3, end - begin, y, element)
            for j in range(min(GROUP, end - pair)):
                _add(job, layer, expert, pair + j, start, stop, y + j * _PITCH, element)


@helper
def _add(job, layer, expert, pair, start, stop, y, element):  # type: ignore[no-untyped-def]
    """Add one pair's weighted outputs start..stop."""
    token, weight = entry_of(word(job, words.TOKENS), pair), peek(word(job, words.WEIGHTS) + 4 * pair, _F32)
    target = word(job, words.OUT) + 4 * token * word(layer, words.HIDDEN)
    bias, whole = part(layer, words.DOWN_BIAS, expert), start + (stop - start) // LANES * LANES
    for row in range(start, whole, LANES):
        value = add(load(y + 4 * (row - start), _F32), bias_lanes(bias, row, LANES, element))
        store(target + 4 * row, fma(splat(weight), value, load(target + 4 * row, _F32)))
    for row in range(whole, stop):
        value = peek(y + 4 * (row - start), _F32) + bias_at(bias, row, element)
        poke(target + 4 * row, peek(target + 4 * row, _F32) + weight * value)


@entry("void(int64)", callback=True)
def work_fp32(job):  # type: ignore[no-untyped-def]
    work(job, np.float32(0))


@entry("void(int64)", callback=True)
def work_bf16(job):  # type: ignore[no-untyped-def]
    work(job, np.uint16(0))


@entry("void(int64)", callback=True)
def work_fp16(job):  # type: ignore[no-untyped-def]
    work(job, np.int16(0))
