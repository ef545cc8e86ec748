"""What all formats share: units of work that threads take from a counter, the activation, the weighted sum.

Three phases: *prepare* brings one token's input into the form that the kernels read; *expand* computes the activated
intermediate of a block of rows of one expert, for all tokens routed to it; *contract* a block of output columns, for
all experts and tokens. Each number is computed by one thread in an order that depends on the routes alone, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.activations import clamp_lanes, first_factor, first_lanes, has_lanes, second_factor
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import atomic_add, atomic_load, peek, poke, size_of, wait_briefly, widen
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, mul, splat, store, zeros

# Rows per unit: large enough that taking one (some 50 ns) does not show, small enough to balance 16 threads, and a
# block of bf16 rows stays in the second-level cache while groups of pairs pass over it.
ROWS = 32
_I32, _I64, _F32, _ZERO = np.int32(0), np.int64(0), np.float32(0), np.float32(0)
_W = words.WORD


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


PREPARE, EXPAND, CONTRACT, NONE = 0, 1, 2, 3


@helper
def next_unit(job, layer):  # type: ignore[no-untyped-def]
    """Take a unit, and wait for those that it needs; the caller reports all but CONTRACT with `report`.

    Returns:
        (PREPARE, token, 0), (EXPAND, index of the active expert, first row), (CONTRACT, first column, columns) or
        (NONE, 0, 0).
    """
    prepared, unit = word(job, words.PREPARES), atomic_add(job + _W * words.NEXT, 1)
    blocks = (word(layer, words.INTERMEDIATE) + ROWS - 1) // ROWS
    expanded = prepared + blocks * word(job, words.ACTIVE)
    if unit < prepared:
        return PREPARE, unit, 0
    if unit < expanded:
        _wait_for(job, prepared)
        return EXPAND, (unit - prepared) // blocks, ROWS * ((unit - prepared) % blocks)
    columns = _columns(job)
    start = columns * (unit - expanded)
    if start >= word(layer, words.HIDDEN):
        return NONE, 0, 0
    _wait_for(job, expanded)
    return CONTRACT, start, columns


def make_work(prepare, expand, contract):  # type: ignore[no-untyped-def]
    """The function by which a thread takes and computes units of a job until none is left.

    Args:
        prepare: makes (job, layer, place, element) ready what both phases read.
        expand: (job, layer, place, size, element), a unit of phase 1.
        contract: (job, layer, place, size, element), a unit of phase 2.
    """

    @helper
    def work(job, element):  # type: ignore[no-untyped-def]
        layer = word(job, words.LAYER)
        while True:
            phase, place, size = next_unit(job, layer)
            if phase == CONTRACT:
                contract(job, layer, place, size, element)
            elif phase == NONE:
                return
            else:
                if phase == PREPARE:
                    prepare(job, layer, place, element)
                else:
                    expand(job, layer, place, size, element)
                report(job)

    return work


@helper
def report(job):  # type: ignore[no-untyped-def]
    """A unit of the first two phases is complete."""
    atomic_add(job + _W * words.DONE, 1)


@helper
def _wait_for(job, units):  # type: ignore[no-untyped-def]
    waited = 0
    while atomic_load(job + _W * words.DONE) < units:
        waited = wait_briefly(waited)


@helper
def _columns(job):  # type: ignore[no-untyped-def]
    """Output columns per unit: twice as many where arithmetic is the limit, since each unit reads all intermediates."""
    active = word(job, words.ACTIVE)
    return 2 * ROWS if entry_of(word(job, words.OFFSETS), active) >= 16 * active else ROWS


@helper
def input_of(job, pair):  # type: ignore[no-untyped-def]
    """Address of the prepared input of a pair's token."""
    return word(job, words.X) + entry_of(word(job, words.TOKENS), pair) * word(job, words.X_BYTES)


@helper
def source_of(job, pair):  # type: ignore[no-untyped-def]
    """Address of the caller's own input of a pair's token, in bf16."""
    n = word(word(job, words.LAYER), words.HIDDEN)
    return word(job, words.SOURCE) + 2 * n * entry_of(word(job, words.TOKENS), pair)


@helper
def inner_of(job, pair):  # type: ignore[no-untyped-def]
    """Address of a pair's activated intermediate."""
    return word(job, words.INNER) + pair * word(job, words.INNER_BYTES)


@helper
def activate(layer, expert, start, stop, first, second, target, element):  # type: ignore[no-untyped-def]
    """Biases and the activation on one pair's products: fp32 rows start..stop at `first` (gate, or up) and `second`.

    `element` is the type of the biases; `target` has room for whole vectors.
    """
    up_bias = part(layer, words.UP_BIAS, expert)
    first_bias = part(layer, words.GATE_BIAS, expert) if word(layer, words.GATE) else up_bias
    if has_lanes(word(layer, words.KIND)):
        for row in range(start, stop, LANES):
            offset, count = 4 * (row - start), stop - row
            g = add(load(first + offset, _F32), bias_lanes(first_bias, row, count, element))
            u = add(load(second + offset, _F32), bias_lanes(up_bias, row, count, element))
            store(target + offset, _lanes(layer, g, u))
    else:
        for row in range(start, stop):
            offset = 4 * (row - start)
            g = peek(first + offset, _F32) + bias_at(first_bias, row, element)
            u = peek(second + offset, _F32) + bias_at(up_bias, row, element)
            poke(target + offset, _generic(layer, g, u))


@helper
def _lanes(layer, g, u):  # type: ignore[no-untyped-def]
    alpha, gate_max = splat(number(layer, words.ALPHA)), splat(number(layer, words.GATE_MAX))
    result = first_lanes(word(layer, words.KIND), alpha, gate_max, splat(number(layer, words.ACT_MAX)), g)
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
def add_output(job, layer, expert, pair, start, stop, y, element):  # type: ignore[no-untyped-def]
    """Add one pair's weighted outputs start..stop, fp32 at `y`; `element` is the type of the biases."""
    token, weight = entry_of(word(job, words.TOKENS), pair), peek(word(job, words.WEIGHTS) + 4 * pair, _F32)
    target = word(job, words.OUT) + 4 * token * word(layer, words.HIDDEN)
    bias, whole = part(layer, words.DOWN_BIAS, expert), start + (stop - start) // LANES * LANES
    for row in range(start, whole, LANES):
        value = add(load(y + 4 * (row - start), _F32), bias_lanes(bias, row, LANES, element))
        store(target + 4 * row, fma(splat(weight), value, load(target + 4 * row, _F32)))
    for row in range(whole, stop):
        value = peek(y + 4 * (row - start), _F32) + bias_at(bias, row, element)
        poke(target + 4 * row, peek(target + 4 * row, _F32) + weight * value)
