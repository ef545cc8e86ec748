"""Replay of routing through a cache: the live cache's decisions, with uploads that take no time."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba import foresight, residency
from moebius.kernels.numba.bundle import BUNDLE
from moebius.kernels.numba.jit import entry, helper

HITS, UPLOADS, PREFETCHES, USED_PREFETCHES = range(4)  # counts
COUNTS = 4

# Of a SlotTable: base, slot_of, visible, key_of, state, pins.
TABLE = "Tuple((int64[::1], int32[::1], int32[::1], int64[::1], uint8[::1], int32[::1]))"
_READY = 2


@helper
def _place(table, layer, experts, slots):  # type: ignore[no-untyped-def]
    """Make experts resident in the slots chosen for them; their number."""
    base, slot_of, visible, key_of, state, _ = table
    placed = 0
    for i in range(len(experts)):
        slot = slots[i]
        if slot >= 0:
            if key_of[slot] >= 0:
                slot_of[key_of[slot]] = visible[key_of[slot]] = -1
            key = base[layer] + experts[i]
            key_of[slot], state[slot], slot_of[key], visible[key] = key, _READY, slot, slot
            placed += 1
    return placed


@helper
def _absent(table, layer, experts):  # type: ignore[no-untyped-def]
    """Those of `experts` that are not resident, int32."""
    base, _, visible, _, _, _ = table
    return experts[visible[base[layer] + experts] < 0]


@helper
def _prefetch(policy, table, predictor, layer, least, unproven):  # type: ignore[no-untyped-def]
    """Offer `layer`'s absent experts whose probability is at least `least`; the number of uploads."""
    _, _, _, key_of, state, pins = table
    count = predictor[1][layer]
    chances = foresight.foresee(predictor, layer, 0)
    experts = np.arange(count).astype(np.int32)
    likely = _absent(table, layer, experts[chances >= least])
    if not len(likely):
        return 0
    certainty = chances[likely].astype(np.float64)
    slots = residency.select(policy, (key_of, state, pins), layer, likely, certainty, residency.PREFETCH)
    for i in range(len(likely)):
        if slots[i] >= 0:
            unproven[table[0][layer] + likely[i]] = True
    return _place(table, layer, likely, slots)


@entry(f"void({BUNDLE}, {TABLE}, {BUNDLE}, int32[:, :, ::1], float64, boolean[::1], int64[:, ::1], int8[:, :, ::1])")
def replay(policy_words, table, predictor_words, ids, least, unproven, counts, outcome):  # type: ignore[no-untyped-def]
    """Drive a policy and a predictor with routing, in the order of the live dispatcher.

    Args:
        policy_words: bundle of `residency.KINDS`.
        table: of a SlotTable; changed in place.
        predictor_words: bundle of `foresight.KINDS`.
        ids: int32 [T, L, k], distinct within a layer step.
        least: probability from which experts are offered for prefetch; above 1 for no prediction at all.
        unproven: whether a key was prefetched and not used since, bool [keys].
        counts: int64 [L, COUNTS], added to.
        outcome: int8 [T, L, k], 1 where the expert was resident when its layer began; empty if not wanted.
    """
    policy, predictor = residency.opened(policy_words), foresight.opened(predictor_words)
    base, _, visible, key_of, state, pins = table
    tokens, layers, top_k = ids.shape
    for token in range(tokens):
        for layer in range(layers):
            experts = ids[token, layer]
            slots = visible[base[layer] + experts]
            for i in range(top_k):
                hit = slots[i] >= 0
                counts[layer, HITS] += hit
                if len(outcome):
                    outcome[token, layer, i] = hit
                if hit:
                    pins[slots[i]] += 1
                counts[layer, USED_PREFETCHES] += hit and unproven[base[layer] + experts[i]]
                unproven[base[layer] + experts[i]] = False
            if least <= 1:
                foresight.absorb(predictor, layer, ids[token, layer : layer + 1])
                if layer + 1 < layers:
                    issued = _prefetch(policy, table, predictor, layer + 1, least, unproven)
                    counts[layer + 1, PREFETCHES] += issued
                    counts[layer + 1, UPLOADS] += issued
            for i in range(top_k):
                if slots[i] >= 0:
                    pins[slots[i]] -= 1
            residency.follow(policy, layer, experts)
            missed = _absent(table, layer, experts)
            if len(missed):
                chances = np.ones(len(missed))
                chosen = residency.select(policy, (key_of, state, pins), layer, missed, chances, residency.ADMIT)
                counts[layer, UPLOADS] += _place(table, layer, missed, chosen)
