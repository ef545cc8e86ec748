"""Experts in int8 and int4: weights are read as codes, activations are quantised on the way (see `groups`)."""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba import words
from moebius.kernels.numba.codes import PANEL_BYTES, dot, group_bytes, pack, tile
from moebius.kernels.numba.groups import CHUNK, chunk_bytes, quantize_group, quantize_vector
from moebius.kernels.numba.integers import INT4, INT8
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import poke, reserve
from moebius.kernels.numba.units import (
    ROWS,
    activate,
    add_output,
    entry_of,
    inner_of,
    input_of,
    make_work,
    part,
    word,
)

assert ROWS == GROUP  # so that the unit that computes a group of the intermediate also quantises it
_BATCH = 64  # pairs that a packed panel serves: packing it costs less than a twentieth of their products
_PITCH = 4 * ROWS  # bytes between the pairs of a batch in a block's results
_BLOCK = _PITCH * _BATCH
_AHEAD = 4096  # bytes, as in `portable`
_FEW = 4  # pairs of an expert for which reading its rows from the first-level cache again beats packing them
_F32 = np.float32(0)


@helper
def prepare(job, layer, token, element):  # type: ignore[no-untyped-def]
    """Quantise one token's input."""
    n, kind, source = word(layer, words.HIDDEN), word(job, words.SOURCE_KIND), word(job, words.SOURCE)
    target = word(job, words.X) + token * word(job, words.X_BYTES)
    if kind == 0:
        quantize_vector(source + 4 * n * token, n, target, np.float32(0), element)
    elif kind == 1:
        quantize_vector(source + 2 * n * token, n, target, np.uint16(0), element)
    else:
        quantize_vector(source + 2 * n * token, n, target, np.int16(0), element)


@helper
def expand(job, layer, active, start, element):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate, quantised, for all its pairs."""
    expert = entry_of(word(job, words.EXPERTS), active)
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, rows = word(layer, words.HIDDEN), min(ROWS, word(layer, words.INTERMEDIATE) - start)
    up, gated = _block(layer, words.UP, words.UP_SCALE, expert, start, n, element), word(layer, words.GATE) != 0
    gate = _block(layer, words.GATE, words.GATE_SCALE, expert, start, n, element) if gated else up
    first, second, result = reserve(_BLOCK), reserve(_BLOCK), reserve(_PITCH)
    for batch in range(begin, end, _BATCH):
        inputs, count = (job, batch, min(_BATCH, end - batch), end - begin), min(_BATCH, end - batch)
        multiply(gate, up, rows, n, inputs, False, first, element)
        if gated:
            multiply(up, gate, rows, n, inputs, False, second, element)
        for j in range(count):
            activate(layer, expert, start, start + rows, first + j * _PITCH, second + j * _PITCH, result, _F32)
            quantize_group(result, rows, inner_of(job, batch + j), start // GROUP, _F32, element)


@helper
def _block(layer, index, scale, expert, start, n, element):  # type: ignore[no-untyped-def]
    """Addresses of codes and scales of a matrix from row `start` on."""
    groups = (n + GROUP - 1) // GROUP
    codes = part(layer, index, expert) + start * groups * group_bytes(element)
    return codes, part(layer, scale, expert) + 2 * start * groups


@helper
def contract(job, layer, start, columns, element):  # type: ignore[no-untyped-def]
    """Output columns start..start + columns of all experts and pairs, in ascending order of experts."""
    stop, n = min(start + columns, word(layer, words.HIDDEN)), word(layer, words.INTERMEDIATE)
    experts, offsets, active = word(job, words.EXPERTS), word(job, words.OFFSETS), word(job, words.ACTIVE)
    y = reserve(_BLOCK)
    for i in range(active):
        expert, begin, end = entry_of(experts, i), entry_of(offsets, i), entry_of(offsets, i + 1)
        after = entry_of(experts, min(i + 1, active - 1))
        for batch in range(begin, end, _BATCH):
            count = min(_BATCH, end - batch)
            for row in range(start, stop, ROWS):
                rows = min(ROWS, stop - row)
                here = _block(layer, words.DOWN, words.DOWN_SCALE, expert, row, n, element)
                then = _block(layer, words.DOWN, words.DOWN_SCALE, after, row, n, element)
                multiply(here, then, rows, n, (job, batch, count, end - begin), True, y, element)
                for j in range(count):
                    add_output(job, layer, expert, batch + j, row, row + rows, y + j * _PITCH, _F32)


@helper
def multiply(here, then, rows, n, inputs, inner, target, element):  # type: ignore[no-untyped-def]
    """Rows of a block (see `_block`) times vectors, into fp32 rows at `target`; `then` is the block that comes next.

    `inputs` are the job, its first pair, the number of pairs, and that of all pairs of the expert, which alone decides
    whether they are computed in tiles; `inner`: the vectors are intermediates, not inputs.
    """
    job, batch, count, pairs = inputs
    if pairs <= _FEW:
        _multiply_few(here, then, rows, n, job, batch, count, inner, target, element)
        return
    groups, panel = (n + GROUP - 1) // GROUP, reserve(PANEL_BYTES)
    pitch = groups * group_bytes(element)
    for chunk in range((groups + CHUNK - 1) // CHUNK):
        ahead = pack(here, then, groups, chunk, rows, panel, element)
        skip, size = chunk * chunk_bytes(element), min(CHUNK, groups - CHUNK * chunk)
        for j in range(0, count, 4):
            j1, j2, j3 = min(j + 1, count - 1), min(j + 2, count - 1), min(j + 3, count - 1)
            x0, x1 = _vector(job, batch + j, inner) + skip, _vector(job, batch + j1, inner) + skip
            x2, x3 = _vector(job, batch + j2, inner) + skip, _vector(job, batch + j3, inner) + skip
            t0, t1, t2, t3 = target + j * _PITCH, target + j1 * _PITCH, target + j2 * _PITCH, target + j3 * _PITCH
            tile(panel, ahead, pitch, size, x0, x1, x2, x3, t0, t1, t2, t3, chunk == 0, element)
            ahead = 0  # asked for


@helper
def _vector(job, pair, inner):  # type: ignore[no-untyped-def]
    return inner_of(job, pair) if inner else input_of(job, pair)


@helper
def _multiply_few(here, then, rows, n, job, batch, count, inner, target, element):  # type: ignore[no-untyped-def]
    groups = (n + GROUP - 1) // GROUP
    pitch = groups * group_bytes(element)
    leap = (_AHEAD + pitch - 1) // pitch  # rows
    for row in range(rows):
        later, block = (row + leap, here) if row + leap < rows else (row + leap - rows, then)
        ahead, ahead_scales = block[0] + later * pitch, block[1] + 2 * later * groups
        codes, scales = here[0] + row * pitch, here[1] + 2 * row * groups
        for j in range(count):
            value = dot(codes, scales, _vector(job, batch + j, inner), groups, ahead, ahead_scales, element)
            poke(target + j * _PITCH + 4 * row, value)
            ahead, ahead_scales = codes, scales  # asked for once


work = make_work(prepare, expand, contract)  # (job, element); `element` tells the weights' type (see `integers`)


@entry("void(int64)", callback=True)
def work_int8(job):  # type: ignore[no-untyped-def]
    work(job, INT8)


@entry("void(int64)", callback=True)
def work_int4(job):  # type: ignore[no-untyped-def]
    work(job, INT4)
