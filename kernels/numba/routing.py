"""Sorting a layer's routing by expert, and listing it for a launch, compiled: the decode path does it per layer."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import peek, widen

FP32, BF16, FP16 = range(3)  # kinds of weights


@helper
def _id(ids, nbytes, i):  # type: ignore[no-untyped-def]
    return peek(ids + 8 * i, np.int64(0)) if nbytes == 8 else np.int64(peek(ids + 4 * i, np.int32(0)))


@helper
def _weight(weights, kind, i):  # type: ignore[no-untyped-def]
    if kind == FP32:
        return peek(weights + 4 * i, np.float32(0))
    return widen(peek(weights + 2 * i, np.uint16(0))) if kind == BF16 else widen(peek(weights + 2 * i, np.int16(0)))


@entry("UniTuple(int64, 2)(int64, int64, int64, int64, int64, int64, int64, int32[::1], float32[::1])")
def sort_by_expert(ids, nbytes, weights, kind, tokens, k, num_experts, numbers, pair_weights):  # type: ignore[no-untyped-def]
    """Counting sort of the pairs that have an expert and a weight.

    Args:
        ids: address of int32 or int64 [T, k], of `nbytes` each.
        weights: address of so many of this `kind`.
        numbers: is filled with experts, offsets and tokens of `Routes` from 0, P and 2 P + 1 on, int32 [3 P + 1] with
            P = T k.
        pair_weights: is filled with the weights, [P].

    Returns the numbers of experts and of pairs, or -1 twice where an id is outside -1..E.
    """
    start = np.zeros(num_experts + 1, np.int32)  # start[e + 1] counts e, then becomes where e's next pair goes
    for i in range(tokens * k):
        expert = _id(ids, nbytes, i)
        if expert < -1 or expert > num_experts:
            return -1, -1
        if expert >= 0 and expert < num_experts and _weight(weights, kind, i) != 0:
            start[expert + 1] += 1
    most = tokens * k
    experts, offsets, pair_tokens = numbers[:most], numbers[most : 2 * most + 1], numbers[2 * most + 1 :]
    active, total = 0, np.int32(0)
    offsets[0] = 0
    for expert in range(num_experts):
        count = start[expert + 1]
        start[expert] = total
        if count:
            experts[active] = expert
            total += count
            active += 1
            offsets[active] = total
    for t in range(tokens):
        for rank in range(k):
            expert, weight = _id(ids, nbytes, t * k + rank), _weight(weights, kind, t * k + rank)
            if expert >= 0 and expert < num_experts and weight != 0:
                pair_tokens[start[expert]], pair_weights[start[expert]] = t, weight
                start[expert] += 1
    return active, np.int64(total)


@entry("UniTuple(int64, 2)(int32[::1], int32[::1], int32[::1], float32[::1], boolean[::1], int32[::1], float32[::1])")
def keep_experts(experts, offsets, tokens, weights, mask, numbers, pair_weights):  # type: ignore[no-untyped-def]
    """`part`, for Python."""
    return part(experts, offsets, tokens, weights, mask, numbers, pair_weights)


@helper
def part(experts, offsets, tokens, weights, mask, numbers, pair_weights):  # type: ignore[no-untyped-def]
    """The part of routes, of P pairs, whose experts have a true entry in `mask`; filled as by a sort."""
    most = len(tokens)
    kept, bounds, kept_tokens = numbers[:most], numbers[most : 2 * most + 1], numbers[2 * most + 1 :]
    active, pairs = 0, 0
    bounds[0] = 0
    for i in range(len(experts)):
        if mask[i]:
            for p in range(offsets[i], offsets[i + 1]):
                kept_tokens[pairs], pair_weights[pairs] = tokens[p], weights[p]
                pairs += 1
            kept[active] = experts[i]
            active += 1
            bounds[active] = pairs
    return active, pairs


@entry("int32[::1](int32[::1], int32[::1], float32[::1], int32[::1], int64)")
def list_pairs(offsets, tokens, weights, slots, count):  # type: ignore[no-untyped-def]
    """``[slot P | token P | weight P (fp32 bits) | order P | start T + 1]``, see `triton.tables.PairTable`.

    Args:
        offsets, tokens, weights: of `Routes`.
        slots: of each expert, [A]; negative for those whose pairs are left out.
        count: T.
    """
    pairs, bits, p = 0, weights.view(np.int32), 0
    for i in range(len(slots)):
        pairs += offsets[i + 1] - offsets[i] if slots[i] >= 0 else 0
    table, place = np.empty(4 * pairs + count + 1, np.int32), np.zeros(count + 1, np.int32)
    for i in range(len(slots)):
        if slots[i] >= 0:
            for pair in range(offsets[i], offsets[i + 1]):
                table[p], table[pairs + p], table[2 * pairs + p] = slots[i], tokens[pair], bits[pair]
                place[tokens[pair] + 1] += 1
                p += 1
    for t in range(count):
        place[t + 1] += place[t]
    table[4 * pairs :] = place
    for p in range(pairs):
        token = table[pairs + p]
        table[3 * pairs + place[token]] = p
        place[token] += 1
    return table


@entry("int32[:,::1](int32[::1], int32[::1], int64)")
def list_tiles(offsets, slots, rows):  # type: ignore[no-untyped-def]
    """Slot, first pair and past the last pair of each run of at most `rows` pairs of one expert, int32 [3, M].

    Pairs are numbered as in `list_pairs`, without those of experts whose slot is negative.
    """
    count = 0
    for i in range(len(slots)):
        count += (offsets[i + 1] - offsets[i] + rows - 1) // rows if slots[i] >= 0 else 0
    tiles, tile, begin = np.empty((3, count), np.int32), 0, 0
    for i in range(len(slots)):
        if slots[i] >= 0:
            end = begin + offsets[i + 1] - offsets[i]
            for first in range(begin, end, rows):
                tiles[0, tile], tiles[1, tile], tiles[2, tile] = slots[i], first, min(first + rows, end)
                tile += 1
            begin = end
    return tiles
