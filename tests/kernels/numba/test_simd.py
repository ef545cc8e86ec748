"""The vector layer against torch and plain Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import address_of, narrow, peek, size_of, widen
from moebius.kernels.numba.simd import LANES, exp, fma, load, load_first, store, total

_BF16, _FP16, _F32 = np.uint16(0), np.int16(0), np.float32(0)


@entry("void(uint16[::1], float32[::1])")
def _vectors_bf16(bits, out):  # type: ignore[no-untyped-def]
    for k in range(0, len(bits), LANES):
        store(address_of(out) + 4 * k, load(address_of(bits) + 2 * k, _BF16))


@entry("void(int16[::1], float32[::1])")
def _vectors_fp16(bits, out):  # type: ignore[no-untyped-def]
    for k in range(0, len(bits), LANES):
        store(address_of(out) + 4 * k, load(address_of(bits) + 2 * k, _FP16))


@entry("void(uint16[::1], float32[::1])")
def _scalars_bf16(bits, out):  # type: ignore[no-untyped-def]
    for k in range(len(bits)):
        out[k] = widen(peek(address_of(bits) + size_of(_BF16) * k, _BF16))


@entry("void(int16[::1], float32[::1])")
def _scalars_fp16(bits, out):  # type: ignore[no-untyped-def]
    for k in range(len(bits)):
        out[k] = widen(peek(address_of(bits) + size_of(_FP16) * k, _FP16))


@pytest.mark.parametrize(
    ("convert", "dtype", "view"),
    [
        (_vectors_bf16, torch.bfloat16, torch.uint16),
        (_scalars_bf16, torch.bfloat16, torch.uint16),
        (_vectors_fp16, torch.float16, torch.int16),
        (_scalars_fp16, torch.float16, torch.int16),
    ],
)
def test_all_16_bit_numbers_become_what_torch_says(convert, dtype, view) -> None:  # type: ignore[no-untyped-def]
    """Bug: subnormals flushed, infinities or NaN lost, signs wrong in the conversion of stored weights."""
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    out = np.empty(2**16, np.float32)
    convert(stored.view(view).numpy(), out)
    expected = stored.to(torch.float32).numpy()
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(out[real].view(np.int32), expected[real].view(np.int32))


@entry("void(float32[::1], int16[::1])")
def _rounded(values, out):  # type: ignore[no-untyped-def]
    for k in range(len(values)):
        out[k] = narrow(values[k])


def test_rounding_to_16_bit_numbers_is_that_of_torch() -> None:
    """Bug: ties, subnormals, overflow or NaN rounded in another way where the processor has no conversion."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    exact = exact[torch.isfinite(exact)]
    ties = (exact.sort().values[1:] + exact.sort().values[:-1]) / 2
    values = torch.cat([exact, ties, ties * (1 + 2**-23), ties * (1 - 2**-23), torch.randn(5000) * 1e4])
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 1e6, 3e38, float("inf"), 1e-9, 1e-42])])
    values = torch.cat([values, -values])
    out = np.empty(len(values), np.int16)
    _rounded(values.numpy(), out)
    np.testing.assert_array_equal(out, values.half().view(torch.int16).numpy())
    _rounded(np.full(len(out), np.nan, np.float32), out)
    assert np.isnan(out.view(np.float16)).all()


@entry("void(float32[::1], int64, float32[::1])")
def _first_lanes(values, count, out):  # type: ignore[no-untyped-def]
    store(address_of(out), load_first(address_of(values), count, _F32))


@pytest.mark.parametrize("count", range(1, LANES))
def test_partial_load_ignores_what_lies_beyond(count: int) -> None:
    """Bug: the NaN of a neighbouring row enters a sum through 0 * NaN."""
    values, out = np.full(LANES, np.nan, np.float32), np.empty(LANES, np.float32)
    values[:count] = np.arange(1, count + 1)
    _first_lanes(values, count, out)
    np.testing.assert_array_equal(out, [*range(1, count + 1), *[0] * (LANES - count)])


@entry("float32(float32[::1], float32[::1], float32[::1])")
def _fused(a, b, c):  # type: ignore[no-untyped-def]
    return total(fma(load(address_of(a), _F32), load(address_of(b), _F32), load(address_of(c), _F32)))


def test_fma_and_total_use_every_lane_once() -> None:
    """Bug: a shuffle that drops or doubles a lane; powers of two make every lane visible in the sum."""
    a, b, c = 2.0 ** np.arange(LANES, dtype=np.float32), np.full(LANES, 2, np.float32), np.ones(LANES, np.float32)
    assert _fused(a.astype(np.float32), b, c) == 2 * (2**LANES - 1) + LANES


@entry("void(float32[::1], float32[::1])")
def _exponentials(values, out):  # type: ignore[no-untyped-def]
    for k in range(0, len(values), LANES):
        store(address_of(out) + 4 * k, exp(load(address_of(values) + 4 * k, _F32)))


def test_exp_is_exact_to_two_units_and_saturates_like_the_library() -> None:
    """Bug: a wrong coefficient or range reduction; NaN, overflow or subnormals lost at the ends."""
    values = np.linspace(-104, 89, 1 << 16, dtype=np.float32)
    values[:5] = np.nan, np.inf, -np.inf, 0, -0.0
    out = np.empty_like(values)
    _exponentials(values, out)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(values.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(exact))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
    finite = np.isfinite(exact)
    assert np.abs(out[finite].view(np.int32) - exact[finite].view(np.int32)).max() <= 2
    assert out[1] == np.inf
    assert out[2] == 0


@pytest.mark.slow
def test_fp16_without_hardware_conversion_is_exact_too(run_python) -> None:  # type: ignore[no-untyped-def]
    """Bug: processors without F16C lose subnormals, infinities or signs of fp16 weights."""
    code = f"import sys, pytest; sys.exit(pytest.main(['-q', '-k', '16_bit_numbers', {__file__!r}]))"
    run_python(code, cwd=Path(__file__).parents[3], path=(Path(__file__).parents[3],), MOEBIUS_ISA="portable")
