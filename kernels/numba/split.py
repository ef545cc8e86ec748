"""Which of a layer's experts the device computes and which the CPU, so that the layer finishes first.

What is minimised is the later of two times. The CPU computes its experts one after the other; while copies are on the
link it is slower by a factor, since both read the host's memory. The device computes resident experts, then fetched
ones as they arrive over the link, one copy after the other. With copies of equal length that order is best if fetched
experts come by descending time on the device (Johnson's rule for two machines in a row).

Costs are curves: microseconds of an expert at some numbers of tokens, `knots`, with straight lines between them and the
last line continued. All arrays of curves are float64 [K], K at least 2.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.routing import part

# Rates: microseconds to copy one expert; factor by which the CPU is slower meanwhile; microseconds that each
# processor's part takes beside its experts, if there is one. Numbers enter faster than an array.
UPLOAD, SLOWDOWN, CPU_START, GPU_START = range(4)
_RATES = "float64, float64, float64, float64"

_GAIN = 1e-6  # relative gain below which a change is none
_PAIRS = 16  # experts up to which moves and exchanges are tried: they won nothing where there were more
_NODES, _NEAR = 200, 0.02  # limit of the search, which takes 17 ns for each, and what it leaves


@helper
def _cost(knots, curve, tokens):  # type: ignore[no-untyped-def]
    """Microseconds of an expert on so many tokens."""
    last = 1
    while last < len(knots) - 1 and tokens > knots[last]:
        last += 1
    slope = (curve[last] - curve[last - 1]) / (knots[last] - knots[last - 1])
    return max(curve[last - 1] + (tokens - knots[last - 1]) * slope, 0.0)


@entry("float64[::1](int32[::1], float64[::1], float64[::1])")
def costs(tokens, knots, curve):  # type: ignore[no-untyped-def]
    """Microseconds of experts with these numbers of tokens, each; zero tokens cost nothing."""
    found = np.zeros(len(tokens))
    for i in range(len(tokens)):
        if tokens[i] > 0:
            found[i] = _cost(knots, curve, tokens[i])
    return found


@entry("float64(int32[::1], float64, float64, float64, float64[::1], float64[::1], float64[::1])")
def observe(tokens, took, memory, start, knots, curve, error):  # type: ignore[no-untyped-def]
    """A call with experts of these numbers of tokens took so many microseconds: move the knots that expected another.

    A knot moves by its share of the expected time, `memory` at most; the curve stays without a fall.

    Args:
        start: microseconds of a call beside its experts.
        error: mean of |expected / took - 1| and number of such calls, both brought up to date, float64 [2].

    Returns:
        The new `start`.
    """
    share = np.zeros(len(knots))
    total = 0.0
    for count in tokens:
        if count <= 0:
            continue
        last = 1
        while last < len(knots) - 1 and count > knots[last]:
            last += 1
        right = min(max((count - knots[last - 1]) / (knots[last] - knots[last - 1]), 0.0), 1.0)
        cost = _cost(knots, curve, count)
        share[last - 1] += cost * (1 - right)
        share[last] += cost * right
        total += cost
    if total <= 0 or took <= 0:
        return start
    _note(error, start + total, took, memory)
    change = memory * (min(max(took / (start + total), 0.1), 10.0) - 1)
    for i in range(len(knots)):
        curve[i] *= 1 + change * share[i] / total
        if i:
            curve[i] = max(curve[i], curve[i - 1])
    return start * (1 + change * start / (start + total))


@helper
def _note(error, predicted, measured, memory):  # type: ignore[no-untyped-def]
    if predicted > 0 and measured > 0:
        error[1] += 1
        error[0] += max(memory, 1 / error[1]) * (abs(predicted / measured - 1) - error[0])


@entry("void(float64[::1], float64, float64, float64)")
def note(error, predicted, measured, memory):  # type: ignore[no-untyped-def]
    """Bring an `error`, as in `observe`, up to date; a prediction of nothing, or of what took no time, is none."""
    _note(error, predicted, measured, memory)


@helper
def _finish(on_device, order, resident, cpu, gpu, rates):  # type: ignore[no-untyped-def]
    """Microseconds until both processors are done; `order` has residents first, then misses by descending `gpu`."""
    on_cpu, computed, arrived, alone = 0.0, 0.0, 0.0, True
    for i in order:
        if not on_device[i]:
            on_cpu += cpu[i]
            continue
        if alone:
            computed, alone = rates[GPU_START], False
        if not resident[i]:
            arrived += rates[UPLOAD]
        computed = max(computed, arrived) + gpu[i]
    return _later(on_cpu, computed, arrived, rates)


@helper
def _later(on_cpu, computed, arrived, rates):  # type: ignore[no-untyped-def]
    """The later end of CPU and device, from the CPU's work alone, the device's end and the end of the last copy."""
    if on_cpu > 0:
        on_cpu += rates[CPU_START]
        on_cpu = min(on_cpu * rates[SLOWDOWN], on_cpu + arrived * (1 - 1 / rates[SLOWDOWN]))
    return max(on_cpu, computed)


@entry(f"float64(boolean[::1], int32[::1], boolean[::1], float64[::1], float64[::1], float64[::1], {_RATES})")
def finish(  # type: ignore[no-untyped-def]
    on_device, tokens, resident, knots, cpu_curve, gpu_curve, upload, slowdown, cpu_start, gpu_start
):  # fmt: skip
    """Microseconds of a layer whose experts run where `on_device` says."""
    rates = (upload, slowdown, cpu_start, gpu_start)
    cpu, gpu, order = _prepare(tokens, resident, knots, cpu_curve, gpu_curve)
    return _finish(on_device, order, resident, cpu, gpu, rates)


@helper
def _prepare(tokens, resident, knots, cpu_curve, gpu_curve):  # type: ignore[no-untyped-def]
    """Times of each expert on both processors; all experts, residents first, each by falling tokens."""
    count, most = len(tokens), 0
    cpu, gpu, order = np.empty(count), np.empty(count), np.empty(count, np.int64)
    for i in range(count):
        cpu[i], gpu[i] = _cost(knots, cpu_curve, tokens[i]), _cost(knots, gpu_curve, tokens[i])
        most = max(most, tokens[i])
    start = np.zeros(2 * most + 3, np.int64)  # where experts of each rank go, by counting
    for i in range(count):
        start[_rank(tokens[i], resident[i], most) + 1] += 1
    for rank in range(len(start) - 1):
        start[rank + 1] += start[rank]
    for i in range(count):
        rank = _rank(tokens[i], resident[i], most)
        order[start[rank]] = i
        start[rank] += 1
    return cpu, gpu, order


@helper
def _rank(tokens, resident, most):  # type: ignore[no-untyped-def]
    return most - tokens + (0 if resident else most + 1)


@entry(
    "UniTuple(int64, 6)(int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], float64[::1], float64[::1], "
    f"float64[::1], {_RATES}, boolean[:, ::1], int32[:, ::1], int32[::1], float32[::1])"
)
def assign(  # type: ignore[no-untyped-def]
    experts, offsets, tokens, weights, slots, knots, cpu_curve, gpu_curve, upload, slowdown, cpu_start, gpu_start,
    flags, lists, cpu_numbers, cpu_weights
):  # fmt: skip
    """Which of a layer's experts the device should compute.

    Args:
        experts, offsets, tokens, weights: of `Routes`.
        slots: of each active expert, [A]; negative for those that are not on the device.
        flags: is filled with the experts that the device should compute, and those that are there, [2, A].
        lists: is filled with the tokens of each, the indices of those that the device has to fetch, the heaviest
            first, and the absent experts themselves, [3, A].
        cpu_numbers, cpu_weights: are filled with the routes of the CPU's part, as by `routing.part`.

    Returns:
        How many experts the device fetches, are absent, and are the device's others; pairs of experts that are there,
        wherever they are computed; experts and pairs of the CPU's part.
    """
    rates = (upload, slowdown, cpu_start, gpu_start)
    there, counts, fetches, missing = flags[1], lists[0], lists[1], lists[2]
    absent, pairs = 0, 0
    for i in range(len(slots)):
        counts[i], there[i] = offsets[i + 1] - offsets[i], slots[i] >= 0
        if there[i]:
            pairs += counts[i]
        else:
            missing[absent] = experts[i]
            absent += 1
    cpu, gpu, order = _prepare(counts, there, knots, cpu_curve, gpu_curve)
    on_device = _split(counts, there, cpu, gpu, order, rates)
    fetched, residents = 0, 0
    for i in order:
        if on_device[i] and there[i]:
            residents += 1
        elif on_device[i]:
            fetches[fetched] = i
            fetched += 1
    flags[0] = on_device
    active, cpu_pairs = part(experts, offsets, tokens, weights, ~on_device, cpu_numbers, cpu_weights)
    return fetched, absent, residents, pairs, active, cpu_pairs


@helper
def _split(tokens, resident, cpu, gpu, order, rates):  # type: ignore[no-untyped-def]
    """The experts that the device should compute, bool [A].

    The best of all splits at a threshold (so many residents and so many misses on the device, the heaviest of them, or
    those at which it is relatively fastest); then, where they are few, moves of one and exchanges of two that gain;
    then branch and bound from there, which proves it nearly the best or stops at a limit. With one token for each
    expert nothing but numbers count, and the first step is exact.
    """
    on_device = _threshold(order, resident, cpu, gpu, rates)
    if len(order) == 0 or tokens.max() == tokens.min():
        return on_device
    best = _finish(on_device, order, resident, cpu, gpu, rates)
    other = _threshold(_by_ratio(order, resident, cpu, gpu), resident, cpu, gpu, rates)
    found = _finish(other, order, resident, cpu, gpu, rates)
    if found < best * (1 - _GAIN):
        best = found
        on_device[:] = other
    if len(order) <= _PAIRS:
        best = _improve(on_device, best, order, resident, cpu, gpu, rates)
    _search(on_device, best, order, resident, cpu, gpu, rates)
    return on_device


@helper
def _by_ratio(order, resident, cpu, gpu):  # type: ignore[no-untyped-def]
    """Residents, then misses, each by ascending time on the device in terms of that on the CPU."""
    found = order.copy()
    for i in range(1, len(found)):
        place = i
        while (
            place
            and resident[found[place - 1]] == resident[found[place]]
            and (gpu[found[place]] * cpu[found[place - 1]] < gpu[found[place - 1]] * cpu[found[place]])
        ):
            found[place], found[place - 1] = found[place - 1], found[place]
            place -= 1
    return found


@helper
def _threshold(order, resident, cpu, gpu, rates):  # type: ignore[no-untyped-def]
    """The best split that puts the first of the residents, and the first of the misses, on the device.

    With more residents there the device ends later and the CPU earlier, so that for each number of misses the best
    number of residents is found by bisection. At equal times as many residents as possible stay on the device.
    """
    count = len(order)
    on_gpu, off_cpu = np.zeros(count + 1), np.zeros(count + 1)  # of the first residents, and of the first misses
    hits, total = 0, 0.0
    for i in order:
        hits += resident[i]
        total += cpu[i]
    for place in range(count):
        i = order[place]
        on_gpu[place + 1], off_cpu[place + 1] = on_gpu[place] + gpu[i], off_cpu[place] + cpu[i]
    best, kept, fetched, chain = np.inf, 0, 0, 0.0
    for f in range(count - hits + 1):
        arrived = f * rates[UPLOAD]
        if f:
            chain = max(chain, arrived) + gpu[order[hits + f - 1]]
        fetching, left = on_gpu[hits + f] - on_gpu[hits], total - (off_cpu[hits + f] - off_cpu[hits])
        low, high = 0, hits  # the first number of residents with which the CPU does not end last
        while low < high:
            h = (low + high) // 2
            gpu_end = max(rates[GPU_START] + on_gpu[h] + fetching, chain) if h + f else 0.0
            on_cpu = left - off_cpu[h] if h + f < count else 0.0
            if _later(on_cpu, 0.0, arrived, rates) <= gpu_end:
                high = h
            else:
                low = h + 1
        for h in range(max(low - 1, 0), hits + 1):
            gpu_end = max(rates[GPU_START] + on_gpu[h] + fetching, chain) if h + f else 0.0
            found = _later(left - off_cpu[h] if h + f < count else 0.0, gpu_end, arrived, rates)
            if found < best * (1 - _GAIN) or (found <= best and h > kept):
                best, kept, fetched = found, h, f
            elif h > low:
                break
    on_device = np.zeros(count, np.bool_)
    for place in range(count):
        on_device[order[place]] = place < kept or hits <= place < hits + fetched
    return on_device


@helper
def _improve(on_device, best, order, resident, cpu, gpu, rates):  # type: ignore[no-untyped-def]
    """Moves of one and exchanges of two that gain, made in `on_device`; the time that it now takes."""
    for i in range(len(order)):
        on_device[i] = not on_device[i]
        found = _finish(on_device, order, resident, cpu, gpu, rates)
        if found < best * (1 - _GAIN):
            best = found
            continue
        gained = False
        for j in range(i):
            if on_device[j] == on_device[i]:
                on_device[j] = not on_device[j]
                found = _finish(on_device, order, resident, cpu, gpu, rates)
                if found < best * (1 - _GAIN):
                    best, gained = found, True
                    break
                on_device[j] = not on_device[j]
        if not gained:
            on_device[i] = not on_device[i]
    return best


@helper
def _search(on_device, best, order, resident, cpu, gpu, rates):  # type: ignore[no-untyped-def]
    """Depth first through all splits that may be faster than `best`; the fastest found goes into `on_device`.

    A split is given up when what is decided takes as long as `best`, or when half the sum of both processors' times
    would, were all others computed where they are fastest.
    """
    count = len(order)
    rest = np.zeros(count + 1)  # of the experts from here on, each where it is faster
    for depth in range(count - 1, -1, -1):
        rest[depth] = rest[depth + 1] + min(cpu[order[depth]], gpu[order[depth]])
    on_cpu, computed, arrived = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count + 1)
    tried, chosen = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    depth, nodes = 0, 0
    while depth >= 0 and nodes < _NODES:
        if depth == count or tried[depth] == 2:
            depth -= 1
            continue
        i = order[depth]
        here = tried[depth] == 0  # on the device first
        tried[depth] += 1
        nodes += 1
        chosen[i] = here
        on_cpu[depth + 1], computed[depth + 1], arrived[depth + 1] = on_cpu[depth], computed[depth], arrived[depth]
        if here:
            begun = computed[depth] if computed[depth] > 0 else rates[GPU_START]
            if not resident[i]:
                arrived[depth + 1] += rates[UPLOAD]
            computed[depth + 1] = max(begun, arrived[depth + 1]) + gpu[i]
        else:
            on_cpu[depth + 1] += cpu[i]
        longest = _later(on_cpu[depth + 1], computed[depth + 1], arrived[depth + 1], rates)
        half = (on_cpu[depth + 1] + computed[depth + 1] + rest[depth + 1]) / 2
        if max(longest, half) >= best * (1 - _NEAR):
            continue
        depth += 1
        if depth < count:
            tried[depth] = 0
            continue
        best = longest
        on_device[:] = chosen
