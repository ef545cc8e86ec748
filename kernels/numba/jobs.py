"""Turns one call into a job: range checks and the job's words, in one compiled function."""

from __future__ import annotations

from moebius.kernels.numba import words
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import address_of
from moebius.kernels.numba.units import slots_of

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


@entry("int64(int64[::1], int64[::1], int64, int64, int64, int64, int64, int64, boolean, int64,"
       " int32[::1], int32[::1], int32[::1], float32[::1], uint8[::1], int64, int64, int64)")  # fmt: skip
def fill(  # type: ignore[no-untyped-def]
    job, layer, num_experts, x, x_kind, num_tokens, few, prepares, paired, out,
    experts, offsets, tokens, weights, memory, x_bytes, inner_bytes, packed_bytes
):  # fmt: skip
    """Write the words of `job`; returns 0, or which argument is wrong (then nothing may be computed)."""
    status = range_error(num_experts, num_tokens, experts, offsets, tokens, weights)
    if status:
        return status
    any_few, any_many = False, False
    for i in range(len(experts)):
        any_many |= offsets[i + 1] - offsets[i] > few
        any_few |= offsets[i + 1] - offsets[i] <= few
    job[words.NEXT], job[words.DONE], job[words.FEW] = 0, 0, few
    job[words.PREPARES], job[words.PACKS] = prepares if any_few else 0, len(experts) if any_many else 0
    job[words.LAYER], job[words.OUT], job[words.ACTIVE] = address_of(layer), out, len(experts)
    job[words.SOURCE], job[words.SOURCE_KIND], job[words.PAIRED] = x, x_kind, paired
    slots, scratch = slots_of(len(tokens), len(experts)), address_of(memory)
    job[words.INNER], job[words.INNER_BYTES] = scratch, inner_bytes
    scratch += slots * inner_bytes
    job[words.PACKED], job[words.PACKED_BYTES] = scratch, packed_bytes
    job[words.X], job[words.X_BYTES] = (scratch + slots * packed_bytes if prepares else x), x_bytes
    job[words.EXPERTS], job[words.OFFSETS] = address_of(experts), address_of(offsets)
    job[words.TOKENS], job[words.WEIGHTS] = address_of(tokens), address_of(weights)
    return 0
