"""Probabilities of the experts of coming layers: a logistic model per layer, learned online from what was used.

Features are the experts of up to four sources (the last `LAGS` layers that are known `ahead` layers before it and, of
the token before, the layer itself), the recent use of the expert, and what the layer's own router says of an earlier
hidden state. One weight belongs to each pair of an expert used by a source and an expert of the layer, one to each
feature of the router, and a bias to each expert, which for a linear router stands for the mean change of the hidden
states in between. AdaGrad steps follow each use. Beside the model stands the record of how right it was.

State is a bundle of arrays, made by `moebius.predictors.forecaster`, in the order of `KINDS`.
"""

from __future__ import annotations

import math

import numpy as np

from moebius.kernels.numba.activations import sigmoid
from moebius.kernels.numba.bundle import BUNDLE, open1, open2, open3, open4
from moebius.kernels.numba.jit import entry, helper
from moebius.kernels.numba.memory import address_of
from moebius.kernels.numba.simd import LANES, load, store

LAGS = 3
AHEAD, ROWS = range(2)  # sizes int64: layers ahead; tokens that `last` has room for
# features of the router: distance from its cut, in deviations; whether it chose the expert; 1, since it was asked
MARGIN, CHOSEN, ASKED = range(3)
GATE = 3
BINS = 20
# record float64, of one layer: forecasts (of an expert for a token), experts at least as likely as not, right of these,
# used; offered (probable enough for a prefetch and absent), right of these; the same two, recent ones counting most.
FORECASTS, PREDICTED, PREDICTED_RIGHT, USED, OFFERED, OFFERED_RIGHT, RECENT, RECENT_RIGHT = range(8)
RECORDS = 8

# The state: kinds of its arrays, and what they hold.
_I64, _I32, _F64, _F32 = np.int64, np.int32, np.float64, np.float32
KINDS = (
    (_I64, 1), (_I64, 1),  # sizes, experts of each layer [L]
    (_I32, 3), (_I64, 1),  # last ids [L, rows, k] (-1: none), their number of tokens [L]
    (_F32, 4), (_F32, 3),  # weights [L, S, E, E] and mean squared gradients [L, S, E]
    (_F32, 3), (_F32, 2),  # bias and its squared gradients [L, 2, E], average use [L, E]
    (_F32, 3),  # weights of average use and the router's features, squared gradients [L, 2, 1 + GATE]
    (_F32, 4), (_I64, 1),  # features of the router [L, GATE, rows, E], for how many rows [L]
    (_F32, 3), (_I64, 1),  # probabilities foreseen [L, rows, E], for how many rows they still hold [L]
    (np.bool_, 2),  # offered, and not judged yet [L, E]
    (_F64, 2), (_F64, 3),  # record [L, RECORDS]; forecasts, their sum, uses by probability [L, 3, B]
)  # fmt: skip
TOKENS, WEIGHTS, BIAS, AVERAGE, SLOPES = 3, 4, 6, 7, 8  # their places there
HINTED, HOLDING, OFFERS, RECORD, CALIBRATION = 10, 12, 13, 14, 15

_RATE, _SLOW_RATE = np.float32(0.2), np.float32(0.05)  # step sizes of weights, and of biases
_AVERAGING = np.float32(1 - 0.5 ** (1 / 16))  # half-life of 16 tokens
_TEACHING = 4  # tokens of a step that are learned from, of those that come together: each takes 2 us for 128 experts
_FORGETTING = 1 / 64  # of the recent record, per expert offered
_FARTHEST = np.float32(6)  # margins beyond say no more
_ONE = np.float32(1)


@helper
def opened(words):  # type: ignore[no-untyped-def]
    """The arrays of a state, a tuple."""
    i64, i32, f64, f32 = np.int64(0), np.int32(0), 0.0, np.float32(0)
    return (
        open1(words, 0, i64), open1(words, 1, i64), open3(words, 2, i32), open1(words, 3, i64),
        open4(words, 4, f32), open3(words, 5, f32), open3(words, 6, f32), open2(words, 7, f32), open3(words, 8, f32),
        open4(words, 9, f32), open1(words, 10, i64), open3(words, 11, f32), open1(words, 12, i64),
        open2(words, 13, np.bool_(False)), open2(words, 14, f64), open3(words, 15, f64),
    )  # fmt: skip


@helper
def _source(state, layer, lag):  # type: ignore[no-untyped-def]
    """The layer whose last ids are source `lag` of `layer`, or -1; the last source is the layer's own past."""
    return layer if lag == LAGS else max(layer - state[0][AHEAD] - lag, -1)


@helper
def foresee(state, layer, row):  # type: ignore[no-untyped-def]
    """Probability that token `row` uses each expert of `layer`, float32 [E], a view of the state."""
    _, experts, last, tokens, weights, _, bias, average, slopes, hints, hinted, said, holding, _, _, _ = state
    count = experts[layer]
    chances = said[layer, row, :count]
    if row < holding[layer]:
        return chances
    for expert in range(count):
        chances[expert] = bias[layer, 0, expert]
    if weights.shape[1]:
        for expert in range(count):
            chances[expert] += slopes[layer, 0, 0] * np.float32(math.sqrt(average[layer, expert]))
    if row < hinted[layer]:
        for feature in range(GATE):
            hint, slope = hints[layer, feature, row], slopes[layer, 0, 1 + feature]
            for expert in range(count):
                chances[expert] += slope * hint[expert]
    for lag in range(weights.shape[1]):
        source = _source(state, layer, lag)
        if source < 0 or row >= tokens[source]:
            continue
        for used in last[source, row]:
            if used >= 0:
                for expert in range(count):
                    chances[expert] += weights[layer, lag, used, expert]
    whole, begin = count // LANES * LANES, address_of(chances)
    for place in range(begin, begin + 4 * whole, 4 * LANES):
        store(place, sigmoid(load(place, _ONE)))
    for expert in range(whole, count):
        chances[expert] = _ONE / (_ONE + np.float32(math.exp(-chances[expert])))
    if row == holding[layer]:
        holding[layer] += 1
    return chances


@helper
def learn(state, layer, row, ids):  # type: ignore[no-untyped-def]
    """Token `row` used the experts `ids` (int32 [k], -1, E: none) of `layer`: a step towards having foreseen them."""
    _, experts, last, tokens, weights, squares, bias, average, slopes, hints, hinted, _, _, _, _, _ = state
    count = experts[layer]
    error = -foresee(state, layer, row)
    for expert in ids:
        if 0 <= expert < count and error[expert] <= 0:  # ids may repeat
            error[expert] += _ONE
    for expert in range(count):
        bias[layer, 1, expert] += error[expert] * error[expert]
        bias[layer, 0, expert] += _SLOW_RATE * error[expert] / np.float32(math.sqrt(bias[layer, 1, expert] + _ONE))
    if weights.shape[1]:
        gradient = np.float32(0)
        for expert in range(count):
            gradient += error[expert] * np.float32(math.sqrt(average[layer, expert]))
        _slope_step(slopes[layer], 0, gradient)
    if row < hinted[layer]:
        for feature in range(GATE):
            gradient, hint = np.float32(0), hints[layer, feature, row]
            for expert in range(count):
                gradient += error[expert] * hint[expert]
            _slope_step(slopes[layer], 1 + feature, gradient)
    grown = np.float32(0)
    for expert in range(count):
        grown += error[expert] * error[expert]
    grown /= np.float32(count)
    for lag in range(weights.shape[1]):
        source = _source(state, layer, lag)
        if source < 0 or row >= tokens[source]:
            continue
        for used in last[source, row]:
            if used >= 0:
                # One step size for all pairs of a used expert: as good as one each, at half the memory.
                squares[layer, lag, used] += grown
                rate = _RATE / np.float32(math.sqrt(squares[layer, lag, used] + _ONE))
                weight = weights[layer, lag, used]
                for expert in range(count):
                    weight[expert] += rate * error[expert]


@helper
def _slope_step(slopes, i, gradient):  # type: ignore[no-untyped-def]
    slopes[1, i] += gradient * gradient
    slopes[0, i] += _RATE * gradient / np.float32(math.sqrt(slopes[1, i] + _ONE))


@helper
def judge(state, layer, ids):  # type: ignore[no-untyped-def]
    """Compare with what was said of the step whose tokens used `ids` (int32 [T, k]) of `layer`."""
    _, experts, _, _, _, _, _, _, _, _, _, said, holding, offered, records, bins = state
    count, record = experts[layer], records[layer]
    used = np.zeros(count, np.bool_)
    if holding[layer] < len(ids):
        offered[layer] = False
        return
    for row in range(len(ids)):
        for expert in ids[row]:
            if 0 <= expert < count:
                used[expert] = True
    for row in range(len(ids)):
        chances = said[layer, row]
        for expert in range(count):
            chance = chances[expert]
            place = min(int(chance * BINS), BINS - 1)
            bins[layer, 0, place] += 1
            bins[layer, 1, place] += chance
            record[PREDICTED] += chance >= 0.5
        for expert in ids[row]:
            if 0 <= expert < count:
                chance = chances[expert]
                bins[layer, 2, min(int(chance * BINS), BINS - 1)] += 1
                record[PREDICTED_RIGHT] += chance >= 0.5
                record[USED] += 1
    record[FORECASTS] += len(ids) * count
    for expert in range(count):
        if offered[layer, expert]:
            offered[layer, expert] = False
            right = 1 if used[expert] else 0
            record[OFFERED] += 1
            record[OFFERED_RIGHT] += right
            record[RECENT] += _FORGETTING * (1 - record[RECENT])
            record[RECENT_RIGHT] += _FORGETTING * (right - record[RECENT_RIGHT])


@helper
def remember(state, layer, ids):  # type: ignore[no-untyped-def]
    """Tokens `ids` (int32 [T, k], -1, E: none) passed `layer`; the ids of more than `ROWS` are not kept."""
    sizes, experts, last, tokens, weights, _, _, average, _, _, hinted, _, holding, _, _, _ = state
    count = experts[layer]
    holding[layer] = 0
    holding[layer + sizes[AHEAD] : layer + sizes[AHEAD] + LAGS] = 0  # whoever reads these ids
    hinted[layer] = 0
    if not weights.shape[1]:
        return
    tokens[layer] = len(ids) if len(ids) <= sizes[ROWS] else 0
    for row in range(len(ids)):
        for expert in range(count):
            average[layer, expert] -= _AVERAGING * average[layer, expert]
        for expert in ids[row]:
            if 0 <= expert < count:
                average[layer, expert] += _AVERAGING
    for row in range(tokens[layer]):
        for i in range(last.shape[2]):
            last[layer, row, i] = ids[row, i] if i < ids.shape[1] and ids[row, i] < count else -1


@helper
def absorb(state, layer, ids):  # type: ignore[no-untyped-def]
    """`judge` the tokens `ids` (int32 [T, k]) of a step of `layer`, `learn` from some, then `remember` them."""
    if len(ids) <= state[0][ROWS]:
        judge(state, layer, ids)
        for row in range(min(len(ids), _TEACHING)):
            learn(state, layer, row, ids[row])
    remember(state, layer, ids)


@helper
def take_hint(state, layer, scores, chosen):  # type: ignore[no-untyped-def]
    """The router of `layer` gave `scores` (float32 [T, E], or none) and `chosen` ids (int32 [T, k]) beforehand."""
    _, experts, _, _, _, _, _, _, _, hints, hinted, _, holding, _, _, _ = state
    count = experts[layer]
    for row in range(len(chosen)):
        margin, choice = hints[layer, MARGIN, row, :count], hints[layer, CHOSEN, row, :count]
        choice[:] = np.float32(0)
        for expert in chosen[row]:
            if 0 <= expert < count:
                choice[expert] = _ONE
        if len(scores):
            _margins(scores[row, :count], choice, margin)
        else:
            margin[:] = np.float32(0)
        hints[layer, ASKED, row, :count] = _ONE
    hinted[layer], holding[layer] = len(chosen), 0


@helper
def _margins(scores, choice, margin):  # type: ignore[no-untyped-def]
    """How far scores are from the cut between the chosen and the others, in standard deviations of this token's."""
    least, most, total, squares = np.float32(np.inf), np.float32(-np.inf), np.float32(0), np.float32(0)
    for expert in range(len(scores)):
        score = scores[expert]
        total += score
        if choice[expert] > 0:
            least = min(least, score)
        else:
            most = max(most, score)
    mean = total / np.float32(len(scores))
    for expert in range(len(scores)):
        squares += (scores[expert] - mean) * (scores[expert] - mean)
    if not (squares > 0 and squares < np.inf and least < np.inf and most > -np.inf):
        margin[:] = np.float32(0)
        return
    cut, scale = np.float32(0.5) * (least + most), np.float32(math.sqrt(np.float32(len(scores)) / squares))
    for expert in range(len(scores)):
        margin[expert] = min(max((scores[expert] - cut) * scale, -_FARTHEST), _FARTHEST)


@entry(f"void({BUNDLE}, int64, int32[:, ::1])")
def observe(words, layer, ids):  # type: ignore[no-untyped-def]
    """`absorb`, for Python."""
    absorb(opened(words), layer, ids)


@entry(f"void({BUNDLE}, int64, float32[:, ::1], int32[:, ::1])")
def hint(words, layer, scores, chosen):  # type: ignore[no-untyped-def]
    """`take_hint`, for Python."""
    take_hint(opened(words), layer, scores, chosen)


@helper
def any_of(state, layer, rows):  # type: ignore[no-untyped-def]
    """Probability that at least one of the first `rows` tokens uses each expert of `layer`, float32 [E]."""
    none = np.ones(state[1][layer], np.float32)
    for row in range(rows):
        chances = foresee(state, layer, row)
        for expert in range(len(none)):
            none[expert] *= _ONE - chances[expert]
    return _ONE - none


@entry(f"float32[::1]({BUNDLE}, int64, int64)")
def chances_of_any(words, layer, rows):  # type: ignore[no-untyped-def]
    """`any_of`, for Python."""
    return any_of(opened(words), layer, rows)


@helper
def offer(state, layer, rows, slots, least, limit):  # type: ignore[no-untyped-def]
    """Experts of `layer` that are in no slot (int32 [E], -1: none) and at least as likely as `least`, likeliest first.

    These, `limit` at most, are noted as offered, to be judged when the layer runs.
    """
    chances = any_of(state, layer, rows)
    offered = state[OFFERS][layer]
    count = 0
    for expert in range(len(chances)):
        offered[expert] = slots[expert] < 0 and chances[expert] >= least
        count += offered[expert]
    experts, likely = np.empty(count, np.int32), np.empty(count)
    done = 0
    for expert in range(len(chances)):
        if offered[expert]:
            place = done
            while place > 0 and likely[place - 1] < chances[expert]:
                experts[place], likely[place] = experts[place - 1], likely[place - 1]
                place -= 1
            experts[place], likely[place] = expert, chances[expert]
            done += 1
    for expert in experts[limit:]:
        offered[expert] = False
    return experts[:limit], likely[:limit]


@entry(
    f"Tuple((int32[::1], float64[::1]))({BUNDLE}, int64, int32[:, ::1], float32[:, ::1], int32[:, ::1], int32[::1], "
    "float64, int64)"
)
def advance(words, layer, ids, scores, chosen, slots, least, limit):  # type: ignore[no-untyped-def]
    """One step of `layer`: `absorb` it, `take_hint` about the layer foreseen from it, and `offer` that one's experts.

    Args:
        ids: int32 [T, k].
        scores: of the router asked, float32 [T, E], or none.
        chosen: its ids, int32 [T, k], or none.
        slots: of the experts of the layer foreseen, int32 [E], or none if there is no such layer.
    """
    state = opened(words)
    absorb(state, layer, ids)
    target = layer + state[0][AHEAD]
    if len(chosen) and len(slots):
        take_hint(state, target, scores, chosen)
    if not len(slots) or len(ids) > state[0][ROWS]:
        return np.empty(0, np.int32), np.empty(0)
    return offer(state, target, len(ids), slots, least, limit)
