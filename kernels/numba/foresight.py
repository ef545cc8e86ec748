"""Probabilities of the experts of coming layers from the ids of past ones: logistic regression, learned online.

The model of a layer has one weight for each pair of an expert used by a source and an expert of the layer. Sources are
the last `LAGS` layers that are known `ahead` layers before it and, of the token before, the layer itself; beside them
count a bias and the recent use of the expert. AdaGrad steps follow each use. State is a tuple of arrays, made by
`moebius.predictors.ids`, in the order of `STATE`.
"""

from __future__ import annotations

import math

import numpy as np

from moebius.kernels.numba.jit import entry, helper

LAGS = 3
AHEAD, ROWS = range(2)  # sizes int64: layers ahead; tokens that `last` has room for
STATE = "Tuple((" + ", ".join([
    "int64[::1]", "int64[::1]",  # sizes, experts of each layer [L]
    "int32[:, :, ::1]", "int64[::1]",  # last ids [L, rows, k] (-1: none), their number of tokens [L]
    "float32[:, :, :, ::1]", "float32[:, :, :, ::1]",  # weights and their squared gradients [L, LAGS + 1, E, E]
    "float32[:, :, ::1]", "float32[:, ::1]",  # bias and its squared gradients [L, 2, E], average use [L, E]
    "float32[:, ::1]",  # weight of the average use and its squared gradients [L, 2]
    "float32[:, :, ::1]", "int64[::1]",  # probabilities foreseen [L, rows, E], for how many rows they still hold [L]
]) + "))"  # fmt: skip

_RATE, _SLOW_RATE = np.float32(0.2), np.float32(0.05)  # step sizes of pair weights, and of all others
_AVERAGING = np.float32(1 - 0.5 ** (1 / 16))  # half-life of 16 tokens
_ONE = np.float32(1)


@helper
def _source(state, layer, lag):  # type: ignore[no-untyped-def]
    """The layer whose last ids are source `lag` of `layer`, or -1; the last source is the layer's own past."""
    return layer if lag == LAGS else max(layer - state[0][AHEAD] - lag, -1)


@helper
def foresee(state, layer, row):  # type: ignore[no-untyped-def]
    """Probability that token `row` uses each expert of `layer`, float32 [E], a view of the state."""
    _, experts, last, tokens, weights, _, bias, average, average_weight, said, holding = state
    count = experts[layer]
    chances = said[layer, row, :count]
    if row < holding[layer]:
        return chances
    for expert in range(count):
        chances[expert] = bias[layer, 0, expert] + average_weight[layer, 0] * np.float32(
            math.sqrt(average[layer, expert])
        )
    for lag in range(LAGS + 1):
        source = _source(state, layer, lag)
        if source < 0 or row >= tokens[source]:
            continue
        for used in last[source, row]:
            if used >= 0:
                for expert in range(count):
                    chances[expert] += weights[layer, lag, used, expert]
    for expert in range(count):
        chances[expert] = _ONE / (_ONE + np.float32(math.exp(-chances[expert])))
    if row == holding[layer]:
        holding[layer] += 1
    return chances


@helper
def learn(state, layer, row, ids):  # type: ignore[no-untyped-def]
    """Token `row` used the experts `ids` (int32 [k], -1: none) of `layer`: one step towards having foreseen them."""
    _, experts, last, tokens, weights, squares, bias, average, average_weight, _, holding = state
    count = experts[layer]
    error = -foresee(state, layer, row)
    holding[layer] = 0
    slope = np.float32(0)
    for expert in ids:
        if expert >= 0:
            error[expert] += _ONE
    for expert in range(count):
        bias[layer, 1, expert] += error[expert] * error[expert]
        bias[layer, 0, expert] += _SLOW_RATE * error[expert] / math.sqrt(bias[layer, 1, expert] + _ONE)
        slope += error[expert] * np.float32(math.sqrt(average[layer, expert]))
    average_weight[layer, 1] += slope * slope
    average_weight[layer, 0] += _SLOW_RATE * slope / math.sqrt(average_weight[layer, 1] + _ONE)
    grown, push = error * error, _RATE * error
    for lag in range(LAGS + 1):
        source = _source(state, layer, lag)
        if source < 0 or row >= tokens[source]:
            continue
        for used in last[source, row]:
            if used >= 0:
                _step(weights[layer, lag, used, :count], squares[layer, lag, used, :count], push, grown)


@helper
def _step(weight, square, push, grown):  # type: ignore[no-untyped-def]
    for expert in range(len(weight)):
        square[expert] += grown[expert]
        weight[expert] += push[expert] / np.float32(math.sqrt(square[expert] + _ONE))


@helper
def remember(state, layer, ids):  # type: ignore[no-untyped-def]
    """Tokens `ids` (int32 [T, k], -1: none) passed `layer`; only the first rows are kept, none of a longer batch."""
    sizes, experts, last, tokens, _, _, _, average, _, _, holding = state
    count = experts[layer]
    holding[layer : layer + sizes[AHEAD] + LAGS] = 0  # whoever reads these ids
    tokens[layer] = len(ids) if len(ids) <= sizes[ROWS] else 0
    for row in range(len(ids)):
        for expert in range(count):
            average[layer, expert] -= _AVERAGING * average[layer, expert]
        for expert in ids[row]:
            if expert >= 0:
                average[layer, expert] += _AVERAGING
    for row in range(tokens[layer]):
        last[layer, row, : ids.shape[1]] = ids[row]


@helper
def absorb(state, layer, ids):  # type: ignore[no-untyped-def]
    """`learn` from the tokens `ids` (int32 [T, k]) of a step of `layer`, then `remember` them."""
    if len(ids) <= state[0][ROWS]:
        for row in range(len(ids)):
            learn(state, layer, row, ids[row])
    remember(state, layer, ids)


@entry(f"void({STATE}, int64, int32[:, ::1])")
def observe(state, layer, ids):  # type: ignore[no-untyped-def]
    """`absorb`, for Python."""
    absorb(state, layer, ids)


@entry(f"float32[::1]({STATE}, int64, int64)")
def chances_of_any(state, layer, rows):  # type: ignore[no-untyped-def]
    """Probability that at least one of the first `rows` tokens uses each expert of `layer`, float32 [E]."""
    count = state[1][layer]
    none = np.ones(count, np.float32)
    for row in range(rows):
        none *= _ONE - foresee(state, layer, row)
    return _ONE - none
