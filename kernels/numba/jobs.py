"""Turns one call into a job: range checks and the job's words, in one compiled function."""

from __future__ import annotations

from moebius.kernels.numba import words
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import address_of

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


@entry("int64(int64[::1], int64[::1], int64, int64, int64, int64, int64, int64,"
       " int32[::1], int32[::1], int32[::1], float32[::1], int64, int64, int64)")  # fmt: skip
def fill(  # type: ignore[no-untyped-def]
    job, layer, num_experts, x, x_kind, num_tokens, prepares, out,
    experts, offsets, tokens, weights, scratch, inner_bytes, x_bytes
):  # fmt: skip
    """Write the words of `job`; returns 0, or which argument is wrong (then nothing may be computed)."""
    status = range_error(num_experts, num_tokens, experts, offsets, tokens, weights)
    if status:
        return status
    job[words.NEXT], job[words.DONE], job[words.PREPARES] = 0, 0, prepares
    job[words.LAYER], job[words.OUT], job[words.ACTIVE] = address_of(layer), out, len(experts)
    job[words.INNER], job[words.INNER_BYTES] = scratch, inner_bytes
    job[words.SOURCE], job[words.SOURCE_KIND] = x, x_kind
    job[words.X], job[words.X_BYTES] = (scratch + inner_bytes * len(tokens) if prepares else x), x_bytes
    job[words.EXPERTS], job[words.OFFSETS] = address_of(experts), address_of(offsets)
    job[words.TOKENS], job[words.WEIGHTS] = address_of(tokens), address_of(weights)
    return 0
