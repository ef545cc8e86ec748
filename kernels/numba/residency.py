"""Which experts deserve the slots of a pool: what they are worth, learned from their use, and which slot to give up.

The live cache calls `observe` and `choose`; replay calls `follow` and `select`, their bodies, from compiled code. State
is a bundle of arrays, made by `moebius.gpu_cache.values`, in the order of `KINDS`; experts of all layers are keys
``base[layer] + expert``.
"""

from __future__ import annotations

import math

import numpy as np

from moebius.kernels.numba.bundle import BUNDLE, open1, open2, open3
from moebius.kernels.numba.jit import entry, helper

# Kinds of value: the step of the last use, the number of uses, or a weighted sum of features in expected uses.
RECENCY, COUNT, FEATURES = 0, 1, 2
# What asks for a slot; equal to `moebius.gpu_cache.policy.Reason`.
ADMIT, PREFETCH, DEMAND = 0, 1, 2

# rules int64: kind; whether weights are learned; whether pairs are counted; whether other layers are listened to; steps
# of a layer after which values stay as they are (0: never); whether each layer has slots of its own.
KIND, LEARNED, PAIRED, LINKED, FROZEN_AFTER, PER_LAYER = range(6)
RULES = 6
# facts float64: price of an upload in misses; share of a layer's experts that a step uses, followed; share of all
# experts that there are slots for.
PRICE, SHARE, ROOM = range(3)
FACTS = 3

# The state: kinds of its arrays, and what they hold.
_I64, _I32, _F64, _F32 = np.int64, np.int32, np.float64, np.float32
KINDS = (
    (_I64, 1), (_F64, 1), (_I64, 1), (_I64, 1),  # rules, facts, base [L + 1], first slot of each layer (if PER_LAYER)
    (_I64, 1), (_F64, 1), (_F64, 1),  # steps [L], value [keys] of an expert that wants a slot, and of one that has one
    (_F64, 1), (_F64, 2),  # rates [A], averages [A, keys]
    (_I64, 1), (_F32, 1), (_F32, 2),  # first pair of each layer [L], pairs [sum E^2], recent and seen [2, keys]
    (_F64, 2), (_F64, 3), (_F64, 2),  # features [keys, F], moments [3, F, F], weights [2, F]
    # first link to a layer from each of the `LAGS` before it [L, LAGS], links [sum of products of E] and the squared
    # errors that they learned from [L, LAGS, E]; experts last used [L, MOST], links last followed [L, LAGS, MOST]
    (_I64, 2), (_F32, 1), (_F32, 3), (_I32, 2), (_I64, 3),
)  # fmt: skip
BASE, STEPS, VALUE, AVERAGES = 2, 4, 5, 8  # their places there
TABLE = ((np.int64, 1), (np.uint8, 1), (np.int32, 1))  # key, state and pins of each slot, as in SlotTable
FREE, LOADING = 0, 1

LAGS = (
    3  # layers before a layer, whose experts say something about the next use of its own; the last are before the first
)
MOST = 16  # experts of a step up to which it says something
_LINK_RATE = 0.05  # at 0.01 and 0.2 costs differ by less than 0.001
# What the weakest of many residents is worth lies below what is foreseen of it, by a choice among errors; so of what
# links say a resident expert counts a third. With all of it, cost rises by 0.005 at a low price.
_LINK_TRUST = 1 / 3

_PAIR_DECAY = 0.5  # of a use's credit per step: the next use counts half, the one after it a quarter
_PAIR_LIMIT = 1000.0  # uses after which an expert's pairs are halved, so that old habits fade
_CONSTANT = 0.1  # the constant feature, of the size of the others
_SAMPLE = 4  # every fourth expert of a step is learned from
_PERIOD, _FADE = 64, 0.999  # steps between solutions for the weights, and what is left of the moments then
_RIDGE = 10.0  # pull of the weights to the prior; at 30, costs of real routing differ by less than 0.001


@helper
def opened(words):  # type: ignore[no-untyped-def]
    """The arrays of a state, a tuple."""
    i64, i32, f64, f32 = np.int64(0), np.int32(0), 0.0, np.float32(0)
    return (
        open1(words, 0, i64), open1(words, 1, f64), open1(words, 2, i64), open1(words, 3, i64),
        open1(words, 4, i64), open1(words, 5, f64), open1(words, 6, f64),
        open1(words, 7, f64), open2(words, 8, f64),
        open1(words, 9, i64), open1(words, 10, f32), open2(words, 11, f32),
        open2(words, 12, f64), open3(words, 13, f64), open2(words, 14, f64),
        open2(words, 15, i64), open1(words, 16, f32), open3(words, 17, f32),
        open2(words, 18, i32), open3(words, 19, i64),
    )  # fmt: skip


@helper
def horizon(facts):  # type: ignore[no-untyped-def]
    """Steps over which an upload has to pay: longer for dear uploads, and where slots hold the experts of many steps.

    Best on real routing within a tenth, from top-1 to top-8 of 32 and 64 experts and prices from 1/4 to 3.
    """
    return max(2.0, math.sqrt(32.0 * facts[ROOM] / max(facts[SHARE], 1e-6)) * facts[PRICE] ** 0.75)


@helper
def follow(state, layer, experts):  # type: ignore[no-untyped-def]
    """One step of `layer` used `experts` (int32 [A], distinct): bring values up to date."""
    rules, facts, base, steps, value = state[0], state[1], state[BASE], state[STEPS], state[VALUE]
    first, count = base[layer], base[layer + 1] - base[layer]
    steps[layer] += 1
    facts[SHARE] += 0.01 * (len(experts) / count - facts[SHARE])
    if rules[KIND] == FEATURES:
        used = np.zeros(count)
        for expert in experts:
            used[expert] = 1.0
        fresh = _pair_scores(state, layer, experts, count)
        _revalue(state, layer, experts, used, fresh)
    elif rules[FROZEN_AFTER] == 0 or steps[layer] <= rules[FROZEN_AFTER]:
        for i in range(len(experts)):
            key = (
                first + experts[i]
            )  # of those used together the last named is the most recent, but by less than a step
            value[key] = steps[layer] + 0.5 * i / len(experts) if rules[KIND] == RECENCY else value[key] + 1


@helper
def _pair_scores(state, layer, experts, count):  # type: ignore[no-untyped-def]
    """Count which experts follow which, and score each expert by what followed those just used before, float64 [E]."""
    rules, facts, base, first_pair, pairs, recent = state[0], state[1], state[BASE], state[9], state[10], state[11]
    scores = np.zeros(count)
    if not rules[PAIRED]:
        return scores
    first, start = base[layer], first_pair[layer]
    for earlier in range(count):
        credit = recent[0, first + earlier]
        if credit > 0:
            for expert in experts:
                pairs[start + earlier * count + expert] += credit
            recent[0, first + earlier] = credit * np.float32(_PAIR_DECAY) if credit > 0.01 else np.float32(0)
    for expert in experts:
        row = pairs[start + expert * count : start + (expert + 1) * count]
        recent[0, first + expert] += np.float32(1 - _PAIR_DECAY)
        recent[1, first + expert] += np.float32(1)
        if recent[1, first + expert] > _PAIR_LIMIT:
            recent[1, first + expert] *= np.float32(0.5)
            row *= np.float32(0.5)
        scale = 1.0 / (recent[1, first + expert] + 1.0) / len(experts)
        for other in range(count):
            scores[other] += (row[other] + facts[SHARE]) * scale
    return scores


@helper
def _revalue(state, layer, experts, used, scores):  # type: ignore[no-untyped-def]
    """New averages, features and values of a layer's experts; what the step teaches about the weights."""
    rules, facts, base, _, steps, value, kept, rates, averages = state[:9]
    features, moments, weights = state[12:15]
    size = len(weights[0])
    distance = horizon(facts)
    if not rules[LEARNED] or steps[0] < _PERIOD:
        weights[0] = distance * weights[1]
    elif layer == 0 and steps[0] % _PERIOD == 0:
        _solve(moments, weights, distance)
    links = _links_of_now(state, layer)
    linked = _follow_links(state, links, len(used))
    errors, trust = np.empty(len(used), np.float32), (1.0 - _LINK_TRUST) * weights[0, size - 2]
    fresh, plain = np.empty(size), 1.0 / (steps[layer] + 1)
    for expert in range(len(used)):
        key = base[layer] + expert
        for i in range(len(rates)):
            rate = max(rates[i], plain)  # at first the plain mean, which a long half-life needs
            averages[i, key] += rate * (used[expert] - averages[i, key])
            fresh[i] = averages[i, key]
        fresh[size - 3], fresh[size - 2], fresh[size - 1] = scores[expert], linked[expert], _CONSTANT
        if rules[LEARNED] and steps[layer] > 1 and (steps[layer] + expert) % _SAMPLE == 0:
            _learn(moments, features[key], fresh, used[expert])
        worth = 0.0
        for i in range(size):
            features[key, i] = fresh[i]
            worth += weights[0, i] * fresh[i]
        errors[expert] = used[expert] + (1.0 - 1.0 / distance) * worth - value[key]
        value[key] = worth
        kept[key] = worth - trust * linked[expert]
    if rules[LINKED]:
        _learn_links(state, layer, errors, distance)
        _remember_links(state, layer, experts, links)


@helper
def _links_of_now(state, layer):  # type: ignore[no-untyped-def]
    """First links of the experts that the layers before `layer` used last, -1 for none, int64 [LAGS, MOST]."""
    links = np.full((LAGS, MOST), np.int64(-1))
    rules, base, first_link, last = state[0], state[BASE], state[15], state[18]
    if rules[LINKED]:
        layers, count = len(last), base[layer + 1] - base[layer]
        for lag in range(LAGS):
            for i, expert in enumerate(last[(layer - 1 - lag) % layers]):
                if expert < 0:
                    break
                links[lag, i] = first_link[layer, lag] + expert * count
    return links


@helper
def _follow_links(state, links, count):  # type: ignore[no-untyped-def]
    """What the links say of each expert of their layer, in uses per step, float32 [E]."""
    said, strengths = np.zeros(count, np.float32), state[16]
    for lag in range(LAGS):
        for first in links[lag]:
            if first < 0:
                break
            strength = strengths[first : first + count]
            for expert in range(count):
                said[expert] += strength[expert]
    return said


@helper
def _learn_links(state, layer, errors, distance):  # type: ignore[no-untyped-def]
    """A step of the links last followed against the errors of values (temporal differences, AdaGrad)."""
    first_link, strengths, squares, links = state[15], state[16], state[17], state[19][layer]
    count = len(errors)
    grown = np.float32(0)
    for error in errors:
        grown += error * error
    for lag in range(LAGS):
        for first in links[lag]:
            if first < 0:
                break
            source = (first - first_link[layer, lag]) // count
            squares[layer, lag, source] += grown / np.float32(count)
            rate = np.float32(_LINK_RATE / distance / math.sqrt(squares[layer, lag, source] + 1))
            strength = strengths[first : first + count]
            for expert in range(count):
                strength[expert] += rate * errors[expert]


@helper
def _remember_links(state, layer, experts, links):  # type: ignore[no-untyped-def]
    last, followed = state[18], state[19]
    followed[layer] = links
    last[layer] = -1
    if len(experts) <= MOST:
        last[layer, : len(experts)] = experts


@helper
def _learn(moments, before, after, used):  # type: ignore[no-untyped-def]
    for i in range(len(before)):
        for j in range(len(before)):
            moments[0, i, j] += before[i] * before[j]
            moments[1, i, j] += before[i] * after[j]
        moments[2, i, 0] += before[i] * used


@helper
def _solve(moments, weights, distance):  # type: ignore[no-untyped-def]
    """Weights whose sum of features is the expected discounted number of coming uses (LSTD, Bradtke & Barto 1996)."""
    size = len(weights[0])
    left, right = np.empty((size, size)), np.empty(size)
    discount = 1.0 - 1.0 / distance
    for i in range(size):
        for j in range(size):
            left[i, j] = moments[0, i, j] - discount * moments[1, i, j]
        left[i, i] += _RIDGE
        right[i] = moments[2, i, 0] + _RIDGE * distance * weights[1, i]
    if _eliminate(left, right):
        weights[0] = right
    moments *= _FADE


@helper
def _eliminate(left, right):  # type: ignore[no-untyped-def]
    """Gauss-Jordan elimination with row pivots; the solution is in `right`. False where there is none."""
    for i in range(len(right)):
        pivot = i
        for row in range(i + 1, len(right)):
            if abs(left[row, i]) > abs(left[pivot, i]):
                pivot = row
        if abs(left[pivot, i]) < 1e-9:
            return False
        for column in range(len(right)):
            left[i, column], left[pivot, column] = left[pivot, column], left[i, column]
        right[i], right[pivot] = right[pivot], right[i]
        for row in range(len(right)):
            factor = left[row, i] / left[i, i]
            if row != i and factor != 0:
                for column in range(i, len(right)):
                    left[row, column] -= factor * left[i, column]
                right[row] -= factor * right[i]
    for i in range(len(right)):
        right[i] /= left[i, i]
    return True


@helper
def select(state, table, layer, experts, chances, reason):  # type: ignore[no-untyped-def]
    """Slot to give to each expert (int32 [n], distinct, in no slot), int32 [n], -1 where none is worth it.

    Args:
        chances: probability that the layer's next step uses the expert, float64 [n]; read for PREFETCH only.
    """
    rules, _, base, shares, steps, value, kept = state[:7]
    keys, states, pins = table
    slots = np.full(len(experts), np.int32(-1))
    begin, end = (shares[layer], shares[layer + 1]) if rules[PER_LAYER] else (0, len(keys))
    by_value = reason != PREFETCH and rules[KIND] != RECENCY
    for i in _most_wanted_first(value, base[layer], experts, chances, by_value):
        key = base[layer] + experts[i]
        slot, weakest = _weakest(keys, states, pins, kept, slots, begin, end)
        if slot < 0 or not _deserves(state, layer, key, weakest, chances[i], reason):
            break
        slots[i] = slot
        if rules[KIND] == RECENCY:
            value[key] = kept[key] = max(value[key], float(steps[layer]))
        elif reason == PREFETCH and rules[KIND] == FEATURES:
            value[key] = kept[key] = _foreseen(state, value[key], chances[i])
    return slots


@helper
def _most_wanted_first(value, first, experts, chances, by_value):  # type: ignore[no-untyped-def]
    """Indices of `experts` by falling value or chance, equals in their order, int64 [n]; insertion, as n is small."""
    order = np.empty(len(experts), np.int64)
    for i in range(len(experts)):
        wish = value[first + experts[i]] if by_value else chances[i]
        place = i
        while place > 0:
            other = order[place - 1]
            if (value[first + experts[other]] if by_value else chances[other]) >= wish:
                break
            order[place] = other
            place -= 1
        order[place] = i
    return order


@helper
def _weakest(keys, states, pins, value, taken, begin, end):  # type: ignore[no-untyped-def]
    """The slot to overwrite, whose expert is worth least, and that worth: -inf for a free slot, slot -1 for none."""
    weakest, least = -1, np.inf
    for slot in range(begin, end):
        key = keys[slot]
        worth = value[key] if key >= 0 else -np.inf
        # The comparison first: it fails for nearly all slots, which makes the scan twice as fast.
        if (worth < least or weakest < 0) and states[slot] != LOADING and pins[slot] == 0 and slot not in taken:
            weakest, least = slot, worth
            if key < 0:
                break
    return weakest, least


@helper
def _foreseen(state, worth, chance):  # type: ignore[no-untyped-def]
    """Expected uses of an expert whose next use has become likelier: the use itself and what it says of later ones."""
    facts, rates, weights = state[1], state[7], state[14]
    later = 0.0
    for i in range(len(rates)):
        later += weights[0, i] * rates[i]
    return worth + (chance - worth / horizon(facts)) * (1.0 + later)


@helper
def _deserves(state, layer, key, weakest, chance, reason):  # type: ignore[no-untyped-def]
    """Whether the expert `key` should take the place of one that is worth `weakest`."""
    rules, facts, steps, value = state[0], state[1], state[STEPS], state[VALUE]
    price = facts[PRICE]
    if reason == DEMAND:
        return True
    if reason == PREFETCH and chance * (1.0 + price) <= price:
        return False
    if weakest == -np.inf:
        return True
    if rules[KIND] == RECENCY:
        return steps[layer] > weakest
    if rules[KIND] == COUNT:
        return value[key] > weakest
    if reason == ADMIT:
        return value[key] - weakest > price
    # Against waiting for the miss: with probability `chance` it comes, and the expert may then be admitted.
    after_use = _foreseen(state, value[key], 1.0) - 1.0
    waiting = chance * max(0.0, after_use - weakest - price)
    return _foreseen(state, value[key], chance) - weakest - price > waiting


@entry(f"void({BUNDLE}, int64, int32[::1])")
def observe(words, layer, experts):  # type: ignore[no-untyped-def]
    """`follow`, for Python."""
    follow(opened(words), layer, experts)


@entry(f"int32[::1]({BUNDLE}, {BUNDLE}, int64, int32[::1], float64[::1], int64)")
def choose(words, table, layer, experts, chances, reason):  # type: ignore[no-untyped-def]
    """`select`, for Python, with a bundle of `TABLE`."""
    slots = open1(table, 0, np.int64(0)), open1(table, 1, np.uint8(0)), open1(table, 2, np.int32(0))
    return select(opened(words), slots, layer, experts, chances, reason)
