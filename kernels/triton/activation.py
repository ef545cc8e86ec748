"""Activations on tiles, in fp32: the device function that all expert kernels share.

NaN passes through every limit, as in torch: ``tl.where`` keeps it where ``tl.minimum`` would drop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import isinf
from typing import Any

import triton
import triton.language as tl

from moebius.kernels.experts import Act, Activation

SILU: tl.constexpr = tl.constexpr(int(Act.SILU))
GELU_TANH: tl.constexpr = tl.constexpr(int(Act.GELU_TANH))
GELU_ERF: tl.constexpr = tl.constexpr(int(Act.GELU_ERF))
RELU: tl.constexpr = tl.constexpr(int(Act.RELU))
RELU2: tl.constexpr = tl.constexpr(int(Act.RELU2))
SOFTCAP_SILU: tl.constexpr = tl.constexpr(int(Act.SOFTCAP_SILU))


@cache
def constants(activation: Activation) -> Mapping[str, Any]:
    """Keyword arguments for a kernel that calls `activate`; limits that are absent are None and cost nothing."""
    limits = (activation.gate_max, activation.act_max, activation.up_max)
    gate_max, act_max, up_max = (None if isinf(limit) else float(limit) for limit in limits)
    return {
        "KIND": int(activation.kind),
        "ALPHA": float(activation.alpha),
        "GATE_MAX": gate_max,
        "ACT_MAX": act_max,
        "UP_MAX": up_max,
        "UP_SHIFT": float(activation.up_shift),
    }


@triton.jit
def activate(gate, up, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT):
    """`kernels.reference.activate` on fp32 tiles of one shape; `up` is ignored where there is no gate."""
    if KIND == SOFTCAP_SILU:
        first = GATE_MAX * _tanh(gate / GATE_MAX) * tl.sigmoid(ALPHA * gate)
    else:
        first = _function(_at_most(gate, GATE_MAX), KIND, ALPHA)
        first = _at_most(first, ACT_MAX)
    if GATED:
        if KIND == SOFTCAP_SILU:
            first *= UP_MAX * _tanh(up / UP_MAX)
        else:
            first *= _within(up, UP_MAX) + UP_SHIFT
    return first


@triton.jit
def _function(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    if KIND == SILU:
        return x * tl.sigmoid(ALPHA * x)
    elif KIND == GELU_TANH:  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == GELU_ERF:
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif KIND == RELU:
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(KIND == RELU2, "an activation without a kernel")
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive


@triton.jit
def _tanh(x):
    # Triton has no portable tanh. Near 0 the sigmoid form cancels; the series is exact to 6e-8 below 0.2.
    square = x * x
    series = x * (1.0 + square * (-0.33333333333 + square * (0.13333333333 - square * 0.053968253968)))
    return tl.where(tl.abs(x) < 0.2, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _at_most(x, LIMIT: tl.constexpr):
    if LIMIT is None:
        return x
    else:
        return tl.where(x > LIMIT, LIMIT, x)


@triton.jit
def _within(x, LIMIT: tl.constexpr):
    if LIMIT is None:
        return x
    else:
        return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
