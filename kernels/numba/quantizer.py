"""Weights to codes and scales: `moebius.kernels.packing.quantize` for rows in host memory."""

from __future__ import annotations

import numpy as np
import torch

from moebius.kernels.formats import GROUP
from moebius.kernels.numba.integers import (
    first_equal,
    halves_of_bytes,
    integers,
    largest_magnitude,
    store_low_bytes,
)
from moebius.kernels.numba.jit import entry, helper, inner
from moebius.kernels.numba.memory import narrow, peek, poke, reserve, size_of, widen
from moebius.kernels.numba.simd import (
    LANES,
    at_least,
    at_most,
    fma,
    load,
    load_first,
    mul,
    nearest,
    splat,
    store,
    sub,
    total,
    zeros,
)

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_F32, _ONE, _ZERO = np.float32(0), np.float32(1), np.float32(0)
_STAGE = 4 * GROUP
_REFINEMENTS = 2


@inner
def _nearest(v, inverse, low, high):  # type: ignore[no-untyped-def]
    return at_most(at_least(nearest(mul(v, inverse)), low), high)


@inner
def _inverse(scale):  # type: ignore[no-untyped-def]
    return splat(_ONE / scale if scale != _ZERO else _ZERO)


@inner
def _half(x):  # type: ignore[no-untyped-def]
    return widen(narrow(x))


@helper
def _evaluate(group, scale, low, high):  # type: ignore[no-untyped-def]
    """The squared error with the nearest codes, and the least-squares scale for those codes."""
    a, b, s, i = load(group, _F32), load(group + 4 * LANES, _F32), splat(scale), _inverse(scale)
    p, q = _nearest(a, i, splat(low), splat(high)), _nearest(b, i, splat(low), splat(high))
    d, e = sub(a, mul(p, s)), sub(b, mul(q, s))
    error, product = total(fma(d, d, mul(e, e))), total(fma(a, p, mul(b, q)))
    norm = total(fma(p, p, mul(q, q)))
    return error, _half(product / max(norm, _ONE))


@helper
def _search(group, starts, low, high):  # type: ignore[no-untyped-def]
    """The best scale of a group of 32 fp32 numbers."""
    a, b = load(group, _F32), load(group + 4 * LANES, _F32)
    peak = largest_magnitude(a, b)
    lane = first_equal(peak, a)
    peak = peek(group + 4 * (lane if lane < LANES else LANES + first_equal(peak, b)), _F32)
    scale = _half(peak / high)
    error, _ = _evaluate(group, scale, low, high)
    for start in range(len(starts)):
        _, trial = _evaluate(group, _half(peak / starts[start]), low, high)
        for _ in range(_REFINEMENTS):
            found, following = _evaluate(group, trial, low, high)
            if found < error:
                scale, error = trial, found
            trial = following
    return scale


@helper
def _stage(source, count, group, kind):  # type: ignore[no-untyped-def]
    """Bring up to 32 stored numbers to fp32 at `group`, zeros behind them."""
    second = zeros()
    if count > LANES:
        after = source + LANES * size_of(kind)
        second = load(after, kind) if count == GROUP else load_first(after, count - LANES, kind)
    store(group, load(source, kind) if count >= LANES else load_first(source, count, kind))
    store(group + 4 * LANES, second)


@helper
def _write(group, scale, low, high, codes, bits):  # type: ignore[no-untyped-def]
    i = _inverse(scale)
    p = integers(_nearest(load(group, _F32), i, splat(low), splat(high)))
    q = integers(_nearest(load(group + 4 * LANES, _F32), i, splat(low), splat(high)))
    if bits == 8:
        store_low_bytes(codes, p)
        store_low_bytes(codes + LANES, q)
    else:
        store_low_bytes(codes, halves_of_bytes(p, q))


@entry("void(int64, int64, int64, int64, int64, int64, int64, float32[::1])")
def quantize_rows(source, kind, rows, columns, codes, scales, bits, starts):  # type: ignore[no-untyped-def]
    """Quantise contiguous rows of kind 0 (fp32), 1 (bf16) or 2 (fp16); codes and scales follow without gaps."""
    high = np.float32(127 if bits == 8 else 7)
    low, group = (-high if bits == 8 else -high - _ONE), reserve(_STAGE)
    for _ in range(rows):
        for k in range(0, columns, GROUP):
            count = min(GROUP, columns - k)
            if kind == 0:
                _stage(source + 4 * k, count, group, np.float32(0))
            elif kind == 1:
                _stage(source + 2 * k, count, group, np.uint16(0))
            else:
                _stage(source + 2 * k, count, group, np.int16(0))
            scale = _search(group, starts, low, high)
            _write(group, scale, low, high, codes, bits)
            poke(scales, narrow(scale))
            codes, scales = codes + 4 * bits, scales + 2
        source += columns * (4 if kind == 0 else 2)


def quantize_into(
    matrix: torch.Tensor, bits: int, starts: list[float], codes: torch.Tensor, scales: torch.Tensor
) -> None:
    """Quantise a matrix, on the calling thread, without Python's lock.

    Args:
        matrix: fp32, bf16 or fp16 [n, m], contiguous, in host memory.
        bits: 8 or 4.
        starts: what the entry of largest magnitude is divided by for the scales from where the search begins.
        codes: uint8 [n, 32 g] or [n, 16 g], contiguous, in host memory; written.
        scales: fp16 [n, g], contiguous, in host memory; written.
    """
    rows, columns = matrix.shape
    divisors, kind = np.array(starts, np.float32), _KINDS[matrix.dtype]
    quantize_rows(matrix.data_ptr(), kind, rows, columns, codes.data_ptr(), scales.data_ptr(), bits, divisors)
