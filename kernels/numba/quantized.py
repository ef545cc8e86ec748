"""Experts in int8, int4 and mxfp4: with few pairs codes times quantised activations (see `groups`), with many unpacked.

Activations in fp32 stay as they are beside mxfp4 (see `coded`), whose weights are exact.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba import words
from moebius.kernels.numba.coded import numbers_of
from moebius.kernels.numba.codes import dot, load_scales, scale_bytes
from moebius.kernels.numba.decoding import group_bytes, unit_of
from moebius.kernels.numba.groups import quantize_group, quantize_vector
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import peek, poke, reserve, size_of
from moebius.kernels.numba.outer import PANEL_ROWS, PITCH, keep_group
from moebius.kernels.numba.simd import LANES, mul, splat, store
from moebius.kernels.numba.units import ROWS, activate, add_output, entry_of, inner_of, input_of, part, slot_of, word

assert ROWS == GROUP  # so that the unit that computes a group of the intermediate also quantises it
# Pairs of an expert for which reading its codes from the first-level cache again beats unpacking them.
FEW = {"int8": 5, "int4": 7, "mxfp4": 4}
_PITCH = 4 * ROWS  # bytes between the pairs in a block's results
_BLOCK = _PITCH * max(FEW.values())
_FACTORS = 4 * LANES
_AHEAD = 4096  # bytes, as in `portable`
_SCALES = words.GATE_SCALE - words.GATE  # from the word of a matrix to that of its scales
_F32, _EIGHT = np.float32(0), np.float32(8)


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
def code_bytes(n, element):  # type: ignore[no-untyped-def]
    """Bytes of a row's codes and of its scales."""
    groups = (n + GROUP - 1) // GROUP
    return groups * group_bytes(element), scale_bytes(element) * groups


@helper
def codes_at(layer, matrix, expert, row, n, element):  # type: ignore[no-untyped-def]
    """Addresses of the codes and the scales of a row."""
    codes, scales = code_bytes(n, element)
    return part(layer, matrix, expert) + row * codes, part(layer, matrix + _SCALES, expert) + row * scales


@helper
def unpack_codes(panel, here, rows, n, begin, end, element, vector):  # type: ignore[no-untyped-def]
    """Columns begin..end of up to sixteen rows, the first of which lies at `here`, into a panel."""
    codes, scales = code_bytes(n, element)
    factors, last = reserve(_FACTORS), (end + GROUP - 1) // GROUP
    for row in range(PANEL_ROWS):
        source, scale = here[0] + codes * min(row, rows - 1), here[1] + scales * min(row, rows - 1)
        target = panel + PITCH * row
        for first in range(begin // GROUP, last, LANES):
            count = min(LANES, last - first)
            store(factors, load_scales(scale + scale_bytes(element) * first, count, element))
            for group in range(count):
                factor = splat(peek(factors + 4 * group, _F32) * unit_of(element))
                u, v = numbers_of(source + (first + group) * group_bytes(element), _EIGHT, element)
                keep_group(target, mul(u, factor), mul(v, factor), vector)
                target += GROUP * size_of(vector)
    return panel, PITCH


@helper
def expand(job, layer, active, start, then, element, bias):  # type: ignore[no-untyped-def]
    """Rows start..start + ROWS of one expert's activated intermediate, quantised."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, rows = word(layer, words.HIDDEN), min(ROWS, word(layer, words.INTERMEDIATE) - start)
    gated = word(layer, words.GATE) != 0
    up, lead = codes_at(layer, words.UP, expert, start, n, element), words.GATE if gated else words.UP
    following = codes_at(layer, lead, after, then[1], n, element)
    first, second, result = reserve(_BLOCK), reserve(_BLOCK), reserve(_PITCH)
    if gated:
        gate = codes_at(layer, words.GATE, expert, start, n, element)
        multiply(gate, up, rows, n, job, begin, end, -1, first, element)
        multiply(up, following, rows, n, job, begin, end, -1, second, element)
    else:
        multiply(up, following, rows, n, job, begin, end, -1, first, element)
    for j in range(end - begin):
        activate(layer, expert, start, start + rows, first + j * _PITCH, second + j * _PITCH, result, bias)
        quantize_group(result, rows, inner_of(job, slot_of(job, active) + j), start // GROUP, _F32, element)


@helper
def contract(job, layer, active, start, stop, then, element, bias):  # type: ignore[no-untyped-def]
    """Output columns start..stop of one expert and its pairs."""
    expert, after = entry_of(word(job, words.EXPERTS), active), entry_of(word(job, words.EXPERTS), then[0])
    begin, end = entry_of(word(job, words.OFFSETS), active), entry_of(word(job, words.OFFSETS), active + 1)
    n, y = word(layer, words.INTERMEDIATE), reserve(_BLOCK)
    for row in range(start, stop, ROWS):
        rows, here = min(ROWS, stop - row), codes_at(layer, words.DOWN, expert, row, n, element)
        following = codes_at(layer, words.DOWN, expert, row + rows, n, element)
        if row + ROWS >= stop:
            following = codes_at(layer, words.DOWN, after, then[1], n, element)
        multiply(here, following, rows, n, job, begin, end, slot_of(job, active), y, element)
        for j in range(end - begin):
            add_output(job, layer, expert, begin + j, row, row + rows, y + j * _PITCH, bias)


@helper
def multiply(here, then, rows, n, job, begin, end, slot, target, element):  # type: ignore[no-untyped-def]
    """Rows at `here` times the inputs of pairs begin..end (the intermediates from `slot` on, if that is not negative).

    Writes fp32 rows at `target`; `then` is what will be read next.
    """
    groups = (n + GROUP - 1) // GROUP
    pitch, scales_pitch = code_bytes(n, element)
    leap = (_AHEAD + pitch - 1) // pitch  # rows
    for row in range(rows):
        later, block = (row + leap, here) if row + leap < rows else (row + leap - rows, then)
        ahead, ahead_scales = block[0] + later * pitch, block[1] + later * scales_pitch
        codes, scales = here[0] + row * pitch, here[1] + row * scales_pitch
        for j in range(end - begin):
            x = inner_of(job, slot + j) if slot >= 0 else input_of(job, begin + j)
            poke(target + j * _PITCH + 4 * row, dot(codes, scales, x, groups, ahead, ahead_scales, element))
            ahead, ahead_scales = codes, scales  # asked for once
