"""Activations as integers in groups of 32, as the kernels for weights in int8, int4 and mxfp4 read them.

A vector of n numbers is ceil(n / 512) chunks of 16 groups. A chunk holds the codes, then sixteen fp32 scales, then,
beside four-bit weights, sixteen int32 that undo the offset of the weights' unsigned numbers: minus that offset times
the sum of the group's codes. Codes are bytes beside int4, whose own error is ten times larger. Beside int8 they are
words of 15 bits, since 8 bits would raise a layer's error from 0.0092 to 0.015, and to 0.019 where some channels are
large; beside mxfp4 they have 16 bits, finer than bf16. They lie as `codes` multiplies them with a line of weights:
beside int8 the even ones of two groups, then the odd ones; beside four-bit weights the first halves of four groups,
then their second halves, and beside mxfp4 so the upper bytes, then the lower ones.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba.decoding import group_bytes
from moebius.kernels.numba.integers import (
    add_ints,
    integers,
    largest_magnitude,
    offset_of,
    planes,
    second_byte,
    store_low_bytes,
    store_words,
    sum_ints,
)
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import poke, size_of
from moebius.kernels.numba.simd import LANES, load, load_first, mul, nearest, splat, zeros

CHUNK = 16  # groups
_NAN, _ZERO = np.float32(np.nan), np.float32(0)
_LARGEST = np.float32(np.finfo(np.float32).max)
_INFINITE = np.float32(np.inf)
# By `planes`: the largest magnitude of a code (beside int8, so that four products stay below 2 ** 31), and how many
# times their size the weights have as they are multiplied.
LIMITS = {"int8": 16383, "int4": 127, "mxfp4": 127 * 256}
_LIMITS, _UNITS = tuple(np.float32(limit) for limit in LIMITS.values()), tuple(np.float32(unit) for unit in (256, 1, 2))
_LINE = 64


@helper
def chunk_bytes(element):  # type: ignore[no-untyped-def]
    """Bytes of a chunk beside weights of the type that `element` tells."""
    return _codes_bytes(element) + (8 if planes(element) else 4) * CHUNK


@helper
def _codes_bytes(element):  # type: ignore[no-untyped-def]
    return (1 if planes(element) == 1 else 2) * CHUNK * GROUP


@helper
def scales_of(chunk, element):  # type: ignore[no-untyped-def]
    """Address of a chunk's scales; its corrections lie 64 bytes beyond."""
    return chunk + _codes_bytes(element)


@helper
def _place_of(group, element):  # type: ignore[no-untyped-def]
    """Offset of a group's first code in a chunk."""
    per_line = _LINE // group_bytes(element)
    return (_codes_bytes(element) // CHUNK * per_line) * (group // per_line) + _LINE // per_line * (group % per_line)


@helper
def quantize_group(source, count, target, group, kind, element):  # type: ignore[no-untyped-def]
    """Quantise the `count` (1..32) numbers of type `kind` at `source` as group `group` of the vector at `target`.

    NaN or infinity makes the scale NaN, and with it every result that the group enters.
    """
    a = load(source, kind) if count >= LANES else load_first(source, count, kind)
    after = source + LANES * size_of(kind)
    b = zeros()
    if count > LANES:
        b = load(after, kind) if count == GROUP else load_first(after, count - LANES, kind)
    peak, limit, unit = largest_magnitude(a, b), _LIMITS[planes(element)], _UNITS[planes(element)]
    scale = peak / (limit * unit) if peak < _INFINITE else _NAN
    inverse = min(limit / peak, _LARGEST) if peak > _ZERO else _ZERO
    p, q = integers(nearest(mul(a, splat(inverse)))), integers(nearest(mul(b, splat(inverse))))
    chunk = target + (group // CHUNK) * chunk_bytes(element)
    place, scales = chunk + _place_of(group % CHUNK, element), scales_of(chunk, element) + 4 * (group % CHUNK)
    poke(scales, scale)
    if planes(element) == 0:
        store_words(place, p, _LINE)
        store_words(place + 16, q, _LINE)
        return
    poke(scales + 4 * CHUNK, np.int32(-offset_of(element) * sum_ints(add_ints(p, q))))
    if planes(element) == 2:
        store_low_bytes(place, second_byte(p))
        store_low_bytes(place + _LINE, second_byte(q))
        place += 2 * _LINE
    store_low_bytes(place, p)
    store_low_bytes(place + _LINE, q)


@helper
def quantize_vector(source, n, target, kind, element):  # type: ignore[no-untyped-def]
    """Quantise n numbers of type `kind` at `source` into the chunks at `target`."""
    for k in range(0, n, GROUP):
        quantize_group(source + size_of(kind) * k, min(GROUP, n - k), target, k // GROUP, kind, element)


def vector_bytes(n: int, format: str) -> int:
    """Bytes of a vector of n in chunks beside weights in `format`."""
    per_group = {"int8": 2 * GROUP + 4, "int4": GROUP + 8, "mxfp4": 2 * GROUP + 8}[format]
    return -(-n // (CHUNK * GROUP)) * CHUNK * per_group
