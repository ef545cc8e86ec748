"""Activations as integers in groups of 32, as the kernels for int8 and int4 weights read them.

A vector of n numbers is ceil(n / 512) chunks of 16 groups. A chunk holds the codes (one plane of 512 bytes beside int4
weights, whose own error is ten times larger; beside int8 weights two, the upper and the lower byte of 16 bits, since
8 bits would raise a layer's error from 0.0092 to 0.015, and to 0.019 where some channels are large), then sixteen fp32
scales, then sixteen int32 that undo the offset of the weights' unsigned codes: minus that offset times the sum of the
group's codes. Within a plane the codes lie as the weights' codes do: in order for int8; for int4 the first halves of
four groups, then their second halves.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.formats import GROUP
from moebius.kernels.numba.integers import (
    add_ints,
    integers,
    largest_magnitude,
    planes,
    second_byte,
    store_low_bytes,
    sum_ints,
)
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import poke, size_of
from moebius.kernels.numba.simd import LANES, load, load_first, mul, nearest, splat, zeros

CHUNK = 16  # groups
PLANE = CHUNK * GROUP  # bytes
_NAN, _ZERO = np.float32(np.nan), np.float32(0)
_LARGEST = np.float32(np.finfo(np.float32).max)
_LIMITS = np.float32(127), np.float32(127 * 256)  # of codes in one and in two planes
_INFINITE = np.float32(np.inf)


@helper
def chunk_bytes(element):  # type: ignore[no-untyped-def]
    """Bytes of a chunk beside weights of the type that `element` tells."""
    return planes(element) * PLANE + 8 * CHUNK


@helper
def scales_of(chunk, element):  # type: ignore[no-untyped-def]
    """Address of a chunk's scales; its corrections lie 64 bytes beyond."""
    return chunk + planes(element) * PLANE


@helper
def place_of(group, element):  # type: ignore[no-untyped-def]
    """Offset of a group's first sixteen codes in a plane."""
    return GROUP * group if planes(element) == 2 else 128 * (group // 4) + 16 * (group % 4)


@helper
def half_of(element):  # type: ignore[no-untyped-def]
    """Bytes from a group's first to its second sixteen codes."""
    return 16 if planes(element) == 2 else 64


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
    peak, limit = largest_magnitude(a, b), _LIMITS[planes(element) - 1]
    scale = peak / limit if peak < _INFINITE else _NAN
    inverse = min(limit / peak, _LARGEST) if peak > _ZERO else _ZERO
    p, q = integers(nearest(mul(a, splat(inverse)))), integers(nearest(mul(b, splat(inverse))))
    chunk = target + (group // CHUNK) * chunk_bytes(element)
    place, scales = chunk + place_of(group % CHUNK, element), scales_of(chunk, element) + 4 * (group % CHUNK)
    if planes(element) == 2:
        store_low_bytes(place, second_byte(p))
        store_low_bytes(place + half_of(element), second_byte(q))
        place += PLANE
    store_low_bytes(place, p)
    store_low_bytes(place + half_of(element), q)
    poke(scales, scale)
    poke(scales + 4 * CHUNK, np.int32(-offset_of(element) * sum_ints(add_ints(p, q))))


@helper
def offset_of(element):  # type: ignore[no-untyped-def]
    """What unsigned codes of weights exceed the signed ones by."""
    return 128 if planes(element) == 2 else 8


@helper
def quantize_vector(source, n, target, kind, element):  # type: ignore[no-untyped-def]
    """Quantise n numbers of type `kind` at `source` into the chunks at `target`."""
    for k in range(0, n, GROUP):
        quantize_group(source + size_of(kind) * k, min(GROUP, n - k), target, k // GROUP, kind, element)


def vector_bytes(n: int, format: str) -> int:
    """Bytes of a vector of n in chunks beside weights in `format`."""
    return -(-n // PLANE) * ((2 if format == "int8" else 1) * PLANE + 8 * CHUNK)
