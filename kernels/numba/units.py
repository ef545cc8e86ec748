"""What all formats share: units of work that threads take from a counter, the activation, the weighted sum.

Three phases: *prepare* brings one token's input into the form that the kernels read; *expand* computes the activated
intermediate of a block of rows of one expert, for all tokens routed to it; *contract* a block of output columns, for
all experts and tokens. Each number is computed by one thread in an order that depends on the routes alone, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.activations import first_factor, second_factor
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import atomic_add, atomic_load, peek, poke, size_of, wait_briefly, widen
from moebius.kernels.numba.simd import LANES, add, fma, load, load_first, mul, splat, store, zeros

# Rows per unit: large enough that taking one (some 50 ns) does not show, small enough to balance 16 threads, and a
# block of bf16 rows stays in the second-level cache while groups of pairs pass over it.
ROWS = 32
_MANY = 64  # pairs of a job whose intermediates displace one another in a second-level cache
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
    column = word(layer, index)
    return peek(column + _W * words.PARTS * expert, _I64) if column else column


@helper
def entry_of(array, index):  # type: ignore[no-untyped-def]
    """Element of an int32 array given by address."""
    return np.int64(peek(array + 4 * index, _I32))


PREPARE, PACK, EXPAND, CONTRACT, NONE = 0, 1, 2, 3, 4


@helper
def take_unit(job, layer):  # type: ignore[no-untyped-def]
    """Take a unit.

    Returns:
        (PREPARE, token, 0), (PACK, index of the active expert, 0), (EXPAND, index of the active expert, first row),
        (CONTRACT, 0, first column) or (NONE, 0, 0).
    """
    prepares, unit = word(job, words.PREPARES), atomic_add(job + _W * words.NEXT, 1)
    if unit < prepares:
        return PREPARE, unit, 0
    unit -= prepares
    if unit < word(job, words.PACKS):
        return PACK, unit, 0
    unit -= word(job, words.PACKS)
    blocks = (word(layer, words.INTERMEDIATE) + ROWS - 1) // ROWS
    if unit < blocks * word(job, words.ACTIVE):
        return EXPAND, unit // blocks, ROWS * (unit % blocks)
    start = first_column(job, layer, unit - blocks * word(job, words.ACTIVE))
    return (CONTRACT, 0, start) if start < word(layer, words.HIDDEN) else (NONE, 0, 0)


@helper
def wait_for(job, layer, phase):  # type: ignore[no-untyped-def]
    """Wait for the units that those of a phase need."""
    units = word(job, words.PREPARES) + word(job, words.PACKS)
    if phase == CONTRACT:
        units += (word(layer, words.INTERMEDIATE) + ROWS - 1) // ROWS * word(job, words.ACTIVE)
    waited = 0
    while phase >= EXPAND and atomic_load(job + _W * words.DONE) < units:
        waited = wait_briefly(waited)


@helper
def report(job):  # type: ignore[no-untyped-def]
    """A unit of the first two phases is complete."""
    atomic_add(job + _W * words.DONE, 1)


@helper
def columns_of(job, layer, start):  # type: ignore[no-untyped-def]
    """Output columns of the unit of phase 2 that begins at `start`.

    Each unit reads all intermediates: where these are many, units are wide, and narrower at the end of the job, so
    that threads end together.
    """
    if entry_of(word(job, words.OFFSETS), word(job, words.ACTIVE)) < _MANY:
        return ROWS
    return 4 * ROWS if start < _wide_units(layer) * 4 * ROWS else 2 * ROWS


@helper
def first_column(job, layer, unit):  # type: ignore[no-untyped-def]
    """First output column of a unit of phase 2, HIDDEN or more beyond the last."""
    if entry_of(word(job, words.OFFSETS), word(job, words.ACTIVE)) < _MANY:
        return ROWS * unit
    return 2 * ROWS * (unit + min(unit, _wide_units(layer)))


@helper
def _wide_units(layer):  # type: ignore[no-untyped-def]
    return word(layer, words.HIDDEN) // (8 * ROWS)


@helper
def has_many(job, active):  # type: ignore[no-untyped-def]
    """Whether an expert has so many pairs that they are computed in panels."""
    offsets = word(job, words.OFFSETS)
    return entry_of(offsets, active + 1) - entry_of(offsets, active) > word(job, words.FEW)


@helper
def slot_of(job, active):  # type: ignore[no-untyped-def]
    """Number of an expert's first slot: its pairs have successive ones, from a multiple of 16 on."""
    return slots_of(entry_of(word(job, words.OFFSETS), active), active)


@helper
def slots_of(pairs, experts):  # type: ignore[no-untyped-def]
    """Slots of the first experts, which have so many pairs together: enough to start each at a multiple of 16."""
    return (pairs + (LANES - 1) * experts) // LANES * LANES


@helper
def input_of(job, pair):  # type: ignore[no-untyped-def]
    """Address of the prepared input of a pair's token."""
    return word(job, words.X) + entry_of(word(job, words.TOKENS), pair) * word(job, words.X_BYTES)


@helper
def packed_of(job, slot):  # type: ignore[no-untyped-def]
    """Address of the packed inputs of sixteen slots."""
    return word(job, words.PACKED) + slot * word(job, words.PACKED_BYTES)


@helper
def inner_of(job, slot):  # type: ignore[no-untyped-def]
    """Address of the activated intermediate of a slot, or, packed, of sixteen."""
    return word(job, words.INNER) + slot * word(job, words.INNER_BYTES)


@helper
def activate(layer, expert, start, stop, first, second, target, element):  # type: ignore[no-untyped-def]
    """Biases and the activation on one pair's products: fp32 rows start..stop at `first` (gate, or up) and `second`.

    `element` is the type of the biases; `target` has room for whole vectors.
    """
    up_bias = part(layer, words.UP_BIAS, expert)
    first_bias = part(layer, words.GATE_BIAS, expert) if word(layer, words.GATE) else up_bias
    for row in range(start, stop, LANES):
        offset, count = 4 * (row - start), stop - row
        g, g_bias = load(first + offset, _F32), bias_lanes(first_bias, row, count, element)
        u, u_bias = load(second + offset, _F32), bias_lanes(up_bias, row, count, element)
        store(target + offset, combine(layer, g, g_bias, u, u_bias))


@helper
def combine(layer, g, g_bias, u, u_bias):  # type: ignore[no-untyped-def]
    """The activation of sixteen numbers: of the gate (of `up`, where there is none) and of `up`, with their biases."""
    kind, alpha = word(layer, words.KIND), splat(number(layer, words.ALPHA))
    gate_max, act_max = splat(number(layer, words.GATE_MAX)), splat(number(layer, words.ACT_MAX))
    result = first_factor(kind, alpha, gate_max, act_max, add(g, g_bias))
    if word(layer, words.GATE):
        up_max, up_shift = splat(number(layer, words.UP_MAX)), splat(number(layer, words.UP_SHIFT))
        result = mul(result, second_factor(kind, up_max, up_shift, add(u, u_bias)))
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
