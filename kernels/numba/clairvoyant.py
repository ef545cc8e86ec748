"""What a cache that knew the future could reach: the most hits of any, and a lower bound on the cost of any.

A trace is a sequence of events of `per_event` uses each. A use is a key (an expert of a layer); the keys of an event
are distinct. A key that stays resident from one use to the next is a hit there and occupies a slot in between.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry, helper

_NEVER = np.int64(1) << 62
_HIT_IF_OUT, _HIT_IF_IN, _FETCHED = 1, 2, 4  # bits of a decision; the first two double as a key's state after a use


@entry("UniTuple(int64[::1], 2)(int64[::1], int64, int64)")
def neighbours(uses, per_event, keys):  # type: ignore[no-untyped-def]
    """Event of the previous use (or -1) and of the next (or 2^62) of the key of each use, int64 [uses] each."""
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
            hits += int(hit)
            held += int(ends[uses[i]] >= 0) - int(hit)
        current: int = uses[event * per_event] // group
        while True:
            members = ends[current * group : (current + 1) * group]
            latest = np.argmax(members)
            last_end[current], last_key[current] = members[latest], current * group + latest
            if held <= slots:
                break
            current = int(np.argmax(last_end))
            ends[last_key[current]] = -1
            held -= 1
    return hits


@entry("float64(int64[::1], int64[::1], int64, int64, int64, float64, boolean, int64)")
def least_cost(uses, before, per_event, keys, slots, upload, prefetch, rounds):  # type: ignore[no-untyped-def]
    """Lower bound on misses + `upload` * uploads of any cache of `slots` slots, however it decides.

    Lagrangian relaxation: a slot costs a price in each gap between two events, and in return any number may be used.
    Then each key decides alone, best by dynamic programming over its uses; for *any* prices >= 0 the sum of these costs
    minus the worth of all slots at these prices is a bound (weak duality). Unrelaxed, the problem is a flow, whose
    linear program has no gap, so the best prices make the bound tight; `rounds` steps of a subgradient method approach
    them (within 1 % after 60 on real routing).

    Args:
        prefetch: whether a key may also be uploaded just before a use, which then hits; else uploads follow a miss.
    """
    events = len(uses) // per_event
    start = 0.4 * per_event / keys  # the order of a slot's marginal worth in real routing
    price, momentum, decided = np.full(events, start), np.zeros(events), np.zeros(len(uses), np.uint8)
    total = np.zeros(events + 1)
    best = 0.0
    for turn in range(rounds):
        for gap in range(events):
            total[gap + 1] = total[gap] + price[gap]
        cost = _decide(uses, before, per_event, keys, upload, prefetch, price, total, decided)
        best = max(best, cost - slots * total[events])
        change = _change_of_occupancy(uses, before, per_event, keys, decided, events)
        _follow_excess(change, slots, 2.4 * start / slots / (1 + turn / 20), momentum, price)
    return best


@helper
def _decide(uses, before, per_event, keys, upload, prefetch, price, total, decided):  # type: ignore[no-untyped-def]
    """Best cost of all keys at these prices; `decided` tells how each use is reached on the way to either state."""
    out, kept = np.zeros(keys), np.full(keys, np.inf)  # best cost so far, if the key leaves after its last use or stays
    for i in range(len(uses)):
        key, event = uses[i], i // per_event
        decision = 0
        hit = kept[key] + total[event] - total[max(before[i], 0)]
        fetched = out[key] + upload + (price[event - 1] if event > 0 else 0.0)
        if prefetch and fetched < hit:
            hit = fetched
            decision = _FETCHED
        miss = out[key] + 1.0
        if hit < miss:
            decision |= _HIT_IF_OUT
        if hit < miss + upload:
            decision |= _HIT_IF_IN
        out[key], kept[key] = min(hit, miss), min(hit, miss + upload)
        decided[i] = decision
    return out.sum()


@helper
def _change_of_occupancy(uses, before, per_event, keys, decided, events):  # type: ignore[no-untyped-def]
    """By how much the slots in use grow from each gap to the next, int32 [events + 1], tracing decisions backwards."""
    change = np.zeros(events + 1, np.int32)
    state = np.full(keys, np.uint8(_HIT_IF_OUT))
    for i in range(len(uses) - 1, -1, -1):
        key, event, decision = uses[i], i // per_event, decided[i]
        if not decision & state[key]:
            state[key] = _HIT_IF_OUT
            continue
        fetched = decision & _FETCHED
        if not fetched or event > 0:
            change[event - 1 if fetched else before[i]] += 1
            change[event] -= 1
        state[key] = _HIT_IF_OUT if fetched else _HIT_IF_IN
    return change


@helper
def _follow_excess(change, slots, step, momentum, price):  # type: ignore[no-untyped-def]
    """Raise prices where more than `slots` are in use, lower them where fewer are."""
    in_use = 0
    for gap in range(len(price)):
        in_use += change[gap]
        excess = in_use - slots
        if price[gap] <= 0 and excess < 0:
            excess = 0
        momentum[gap] = 0.7 * momentum[gap] + excess
        price[gap] = max(0.0, price[gap] + step * momentum[gap])
