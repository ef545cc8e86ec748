"""The activations of `moebius.kernels.experts.Act` for sixteen lanes, with torch's treatment of NaN and infinity."""

from __future__ import annotations

import math

import numpy as np

from moebius.kernels.experts import Act
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.simd import (
    add,
    at_least,
    at_most,
    div,
    exp,
    fma,
    magnitude,
    mul,
    splat,
    sub,
    where_below,
    zeros,
)

_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_GELU_CUBIC, _TWICE_SQRT_2_OVER_PI = np.float32(0.044715), np.float32(2 * math.sqrt(2 / math.pi))
_SILU, _GELU_TANH, _GELU_ERF = int(Act.SILU), int(Act.GELU_TANH), int(Act.GELU_ERF)
_RELU, _SOFTCAP_SILU = int(Act.RELU), int(Act.SOFTCAP_SILU)
# (tanh(z) - z) / z ** 3 as a polynomial in z ** 2 for |z| < 0.625, of error 5e-9.
_T0, _T1, _T2 = np.float32(-0.33333278), np.float32(0.13331329), np.float32(-0.05372923)
_T3, _T4, _SMALL = np.float32(0.02060201), np.float32(-0.00566079), np.float32(0.625)
# erfc(z) / 2 = exp(-z ** 2) * t * polynomial(t), t = 1 / (1 + 0.4 z), of error 5e-8 / max(1, z).
_SLOPE = np.float32(0.4 * math.sqrt(0.5))
_N0, _N1, _N2 = np.float32(0.12581455), np.float32(0.0041786), np.float32(0.48110451)
_N3, _N4, _N5, _N6 = np.float32(-0.60606614), np.float32(0.75447193), np.float32(-0.30142692), np.float32(0.04192352)


@helper
def first_factor(kind, alpha, gate_max, act_max, x):  # type: ignore[no-untyped-def]
    """The factor of the gate (of `up`, where there is no gate); all arguments but the kind are vectors."""
    if kind == _SOFTCAP_SILU:
        return mul(_softcap(x, gate_max), sigmoid(mul(alpha, x)))
    x = at_most(x, gate_max)
    if kind == _SILU:
        result = mul(x, sigmoid(mul(alpha, x)))
    elif kind == _GELU_TANH:  # (1 + tanh z) / 2 is the sigmoid of 2 z
        cubic = mul(mul(splat(_GELU_CUBIC), mul(x, x)), x)
        result = mul(x, sigmoid(mul(splat(_TWICE_SQRT_2_OVER_PI), add(x, cubic))))
    elif kind == _GELU_ERF:
        result = mul(x, _normal(x))
    else:
        positive = at_least(x, zeros())
        result = positive if kind == _RELU else mul(positive, positive)
    return at_most(result, act_max)


@helper
def second_factor(kind, up_max, up_shift, x):  # type: ignore[no-untyped-def]
    """The factor of `up`, beside a gate; all arguments but the kind are vectors."""
    if kind == _SOFTCAP_SILU:
        return _softcap(x, up_max)
    return add(at_least(at_most(x, up_max), sub(zeros(), up_max)), up_shift)


@helper
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x))."""
    return div(splat(_ONE), add(splat(_ONE), exp(sub(zeros(), x))))


@helper
def _softcap(x, limit):  # type: ignore[no-untyped-def]
    return mul(limit, _tanh(div(x, limit)))


@helper
def _tanh(z):  # type: ignore[no-untyped-def]
    square = mul(z, z)
    p = fma(fma(splat(_T4), square, splat(_T3)), square, splat(_T2))
    p = fma(fma(p, square, splat(_T1)), square, splat(_T0))
    small = fma(mul(z, square), p, z)
    large = sub(splat(_ONE), div(splat(_TWO), add(splat(_ONE), exp(add(z, z)))))
    return where_below(magnitude(z), splat(_SMALL), small, large)


@helper
def _normal(x):  # type: ignore[no-untyped-def]
    """The normal distribution function, (1 + erf(x / sqrt(2))) / 2."""
    t = div(splat(_ONE), fma(splat(_SLOPE), magnitude(x), splat(_ONE)))
    p = fma(fma(fma(splat(_N6), t, splat(_N5)), t, splat(_N4)), t, splat(_N3))
    p = mul(fma(fma(fma(p, t, splat(_N2)), t, splat(_N1)), t, splat(_N0)), t)
    tail = mul(p, exp(mul(mul(splat(-_HALF), x), x)))
    return where_below(x, zeros(), tail, sub(splat(_ONE), tail))
