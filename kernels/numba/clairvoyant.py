"""What a cache that knew the future could reach: the most hits of any, and a lower bound on the cost of any.

A trace is a sequence of events of `per_event` uses each; a use is a key (an expert of a layer), the keys of an event are
distinct. A key that stays resident from one use to the next is a hit there and occupies a slot in between.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry

NEVER = 1 << 62
_NEVER = np.int64(NEVER)
_HIT_IF_OUT, _HIT_IF_IN, _FETCHED = 1, 2, 4  # bits of a decision; the first two double as the key's state after a use


@entry("UniTuple(int64[::1], 2)(int64[::1], int64, int64)")
def neighbours(uses, per_event, keys):  # type: ignore[no-untyped-def]
    """Event of the previous (or -1) and of the next use (or NEVER) of the key of each use, int64 [uses] each."""
    before, after = np.empty(len(uses), np.int64), np.empty(len(uses), np.int64)
    seen = np.full(keys, np.int64(-1))
    for i in range(len(uses)):
        before[i] = seen[uses[i]]
        seen[uses[i]] = i // per_event
    seen[:] = _NEVER
    for i in range(len(uses) - 1, -1, -1):
        after[i] = seen[uses[i]]
        seen[uses[i]] = i // per_event
    return before, after


@entry("int64(int64[::1], int64[::1], int64, int64, int64, int64)")
def most_hits(uses, after, per_event, keys, group, slots):  # type: ignore[no-untyped-def]
    """Hits of a cache that keeps what is used soonest and lets the rest pass by (Belady, with the freedom to bypass).

    Whenever more than `slots` intervals between uses overlap, the one that ends last is dropped; that leaves the most
    intervals (Carlisle & Lloyd 1995). The keys of an event lie in one `group` of consecutive keys, whose latest end is
    remembered, so that an eviction looks at one group and at one number of each other.
    """
    ends = np.full(keys, np.int64(-1))  # next use of each resident key
    last_end, last_key = np.full(keys // group, np.int64(-1)), np.zeros(keys // group, np.int64)
    hits = held = 0
    for event in range(len(uses) // per_event):
        for i in range(event * per_event, (event + 1) * per_event):
            hit = ends[uses[i]] >= 0
            ends[uses[i]] = -1 if after[i] == _NEVER else after[i]
            hits += hit
            held += (ends[uses[i]] >= 0) - hit
        current = uses[event * per_event] // group
        while True:
            members = ends[current * group : (current + 1) * group]
            latest = np.argmax(members)
            last_end[current], last_key[current] = members[latest], current * group + latest
            if held <= slots:
                break
            current = np.argmax(last_end)
            ends[last_key[current]] = -1
            held -= 1
    return hits


@entry("float64(int64[::1], int64[::1], int64, int64, int64, float64, boolean, int64)")
def least_cost(uses, before, per_event, keys, slots, upload, prefetch, rounds):  # type: ignore[no-untyped-def]
    """Lower bound on misses + `upload` * uploads of any cache of `slots` slots, however it decides.

    Lagrangian relaxation: each slot costs a price in each gap between events, and in return any number may be used.
    Then each key decides alone, best by dynamic programming over its uses, and for *any* prices >= 0 the sum of these
    costs minus the worth of the slots at these prices is a bound (weak duality). The problem without relaxation is a
    flow, so that the best prices make the bound tight; `rounds` steps of a subgradient method approach them.

    Args:
        prefetch: whether a key may be uploaded just before a use, which then hits; else uploads follow a miss.
    """
    events = len(uses) // per_event
    start = 0.4 * per_event / keys  # about the marginal worth of a slot at a quarter resident
    price = np.full(events, start)  # of a slot between an event and the next
    total, momentum, step = np.zeros(events + 1), np.zeros(events), 0.3 * start
    out, kept, decided = np.empty(keys), np.empty(keys), np.empty(len(uses), np.uint8)
    best = 0.0
    for turn in range(rounds):
        for gap in range(events):
            total[gap + 1] = total[gap] + price[gap]
        out[:], kept[:] = 0.0, np.inf
        for i in range(len(uses)):
            key, event, decision = uses[i], i // per_event, 0
            hit = kept[key] + total[event] - total[max(before[i], 0)]
            if prefetch and event > 0 and out[key] + upload + price[event - 1] < hit:
                hit = out[key] + upload + price[event - 1]
                decision = _FETCHED
            miss = out[key] + 1.0
            decision |= _HIT_IF_OUT * (hit < miss) | _HIT_IF_IN * (hit < miss + upload)
            out[key], kept[key] = min(hit, miss), min(hit, miss + upload)
            decided[i] = decision
        best = max(best, out.sum() - slots * total[events])
        _follow_excess(
            _occupied(uses, before, per_event, keys, decided, events), slots, step / (1 + turn / 20), momentum, price
        )  # noqa: E501
    return best
