"""The activations of `moebius.kernels.experts.Act`, with torch's treatment of NaN and infinity.

All of them come for scalars; all but the exact GELU and the soft-capped SiLU also for sixteen lanes.
"""

from __future__ import annotations

import math

import numpy as np

from moebius.kernels.experts import Act
from moebius.kernels.numba import simd
from moebius.kernels.numba.jit import helper

_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_SQRT_HALF, _SQRT_2_OVER_PI = np.float32(math.sqrt(0.5)), np.float32(math.sqrt(2 / math.pi))
_GELU_CUBIC, _TWICE_SQRT_2_OVER_PI = np.float32(0.044715), np.float32(2 * math.sqrt(2 / math.pi))
_SILU, _GELU_TANH, _GELU_ERF = int(Act.SILU), int(Act.GELU_TANH), int(Act.GELU_ERF)
_RELU, _SOFTCAP_SILU = int(Act.RELU), int(Act.SOFTCAP_SILU)


@helper
def at_most(x, limit):  # type: ignore[no-untyped-def]
    """min(x, limit), where NaN stays NaN."""
    return limit if x > limit else x


@helper
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + math.exp(-x))


@helper
def _softcap(x, limit):  # type: ignore[no-untyped-def]
    return limit * math.tanh(x / limit)


@helper
def _function(kind, alpha, x):  # type: ignore[no-untyped-def]
    if kind == _SILU:
        return x * _sigmoid(alpha * x)
    if kind == _GELU_TANH:
        return _HALF * x * (_ONE + math.tanh(_SQRT_2_OVER_PI * (x + _GELU_CUBIC * x * x * x)))
    if kind == _GELU_ERF:
        return _HALF * x * (_ONE + math.erf(x * _SQRT_HALF))
    positive = _ZERO if x < _ZERO else x
    return positive if kind == _RELU else positive * positive


@helper
def first_factor(kind, alpha, gate_max, act_max, x):  # type: ignore[no-untyped-def]
    """The factor that comes from the gate (from `up`, where there is no gate)."""
    if kind == _SOFTCAP_SILU:
        return _softcap(x, gate_max) * _sigmoid(alpha * x)
    return at_most(_function(kind, alpha, at_most(x, gate_max)), act_max)


@helper
def second_factor(kind, up_max, up_shift, x):  # type: ignore[no-untyped-def]
    """The factor that comes from `up`, beside a gate."""
    if kind == _SOFTCAP_SILU:
        return _softcap(x, up_max)
    return -at_most(-at_most(x, up_max), up_max) + up_shift


@helper
def has_lanes(kind):  # type: ignore[no-untyped-def]
    """Whether `first_lanes` and `clamp_lanes` compute an activation."""
    return kind != _GELU_ERF and kind != _SOFTCAP_SILU


@helper
def first_lanes(kind, alpha, gate_max, act_max, x):  # type: ignore[no-untyped-def]
    """`first_factor` for sixteen lanes; all arguments but the kind are vectors."""
    x = simd.at_most(x, gate_max)
    if kind == _SILU:
        result = _times_sigmoid(x, simd.mul(alpha, x))
    elif kind == _GELU_TANH:  # (1 + tanh z) / 2 is the sigmoid of 2 z
        cubic = simd.mul(simd.mul(simd.splat(_GELU_CUBIC), simd.mul(x, x)), x)
        result = _times_sigmoid(x, simd.mul(simd.splat(_TWICE_SQRT_2_OVER_PI), simd.add(x, cubic)))
    else:
        positive = simd.at_least(x, simd.zeros())
        result = positive if kind == _RELU else simd.mul(positive, positive)
    return simd.at_most(result, act_max)


@helper
def _times_sigmoid(x, z):  # type: ignore[no-untyped-def]
    return simd.div(x, simd.add(simd.splat(_ONE), simd.exp(simd.mul(simd.splat(-_ONE), z))))


@helper
def clamp_lanes(limit, shift, x):  # type: ignore[no-untyped-def]
    """`second_factor` for sixteen lanes; all arguments are vectors."""
    lower = simd.mul(simd.splat(-_ONE), limit)
    return simd.add(simd.at_least(simd.at_most(x, limit), lower), shift)
