"""Turns one call into a job: range checks, fp32 inputs, and the job's words, in one compiled function."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import words
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import address_of, peek, size_of, widen
from moebius.kernels.numba.simd import LANES, load, store

BAD_EXPERT, BAD_TOKEN, BAD_OFFSETS = 1, 2, 3


@helper
def range_error(num_experts, num_tokens, experts, offsets, tokens, weights):  # type: ignore[no-untyped-def]
    """0, or which part of the routes is out of range."""
    if len(offsets) != len(experts) + 1 or len(weights) != len(tokens):
        return BAD_OFFSETS
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        return BAD_OFFSETS
    for i in range(len(experts)):
        if offsets[i] > offsets[i + 1]:
            return BAD_OFFSETS
        if experts[i] < 0 or experts[i] >= num_experts:
            return BAD_EXPERT
    for token in tokens:
        if token < 0 or token >= num_tokens:
            return BAD_TOKEN
    return 0


@entry("int64(int64, int64, int32[::1], int32[::1], int32[::1], float32[::1])")
def find_range_error(num_experts, num_tokens, experts, offsets, tokens, weights):  # type: ignore[no-untyped-def]
    return range_error(num_experts, num_tokens, experts, offsets, tokens, weights)


@helper
def _to_fp32(source, target, count, element):  # type: ignore[no-untyped-def]
    whole = count - count % LANES
    for k in range(0, whole, LANES):
        store(address_of(target) + 4 * k, load(source + size_of(element) * k, element))
    for k in range(whole, count):
        target[k] = widen(peek(source + size_of(element) * k, element))


@entry("int64(int64[::1], int64[::1], int64, int64, int64, int64, int64,"
       " int32[::1], int32[::1], int32[::1], float32[::1], float32[::1], int64)")  # fmt: skip
def fill(  # type: ignore[no-untyped-def]
    job, layer, num_experts, x, x_kind, num_tokens, out, experts, offsets, tokens, weights, scratch, stride
):
    """Write the words of `job`; returns 0, or which argument is wrong (then nothing may be computed)."""
    status = range_error(num_experts, num_tokens, experts, offsets, tokens, weights)
    if status:
        return status
    plane = stride * len(tokens)
    if x_kind:
        wide = scratch[plane:]
        if x_kind == 1:
            _to_fp32(x, wide, num_tokens * layer[words.HIDDEN], np.uint16(0))
        else:
            _to_fp32(x, wide, num_tokens * layer[words.HIDDEN], np.int16(0))
        x = address_of(wide)
    job[words.NEXT], job[words.DONE] = 0, 0
    job[words.LAYER], job[words.X], job[words.OUT] = address_of(layer), x, out
    job[words.INNER], job[words.STRIDE], job[words.ACTIVE] = address_of(scratch), stride, len(experts)
    job[words.EXPERTS], job[words.OFFSETS] = address_of(experts), address_of(offsets)
    job[words.TOKENS], job[words.WEIGHTS] = address_of(tokens), address_of(weights)
    return 0
