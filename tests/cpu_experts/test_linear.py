"""Products of dense layers: right beside float64, and the same for every number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.cpu_experts import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """Torch's number of threads is put back after a test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threads: int) -> torch.Tensor:
    torch.set_num_threads(threads)
    out = linear.multiply(x, weight, bias)
    assert out is not None
    return out


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 17), n=st.integers(1, 200), width=st.integers(1, 140), dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_are_right_and_do_not_depend_on_threads(
    rows: int, n: int, width: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    """Bug: rows behind the last whole block, or vectors behind the last four, are lost or computed from others."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(count, n, generator=generator).to(dtype) for count in (rows, width))
    bias = torch.randn(width, generator=generator).to(dtype) if with_bias else None
    out = product(x, weight, bias, 1)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    assert out.dtype == dtype
    assert out.shape == (rows, width)
    rounding = exact.abs() * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    assert ((out.double() - exact).abs() <= rounding + 1e-6 * size + 1e-7).all()
    for threads in (2, 3):
        assert torch.equal(product(x, weight, bias, threads), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_shape_and_strides(dtype: torch.dtype) -> None:
    """Bug: an input that is no contiguous matrix is read as if it were one."""
    wide, weight = torch.randn(2, 3, 40).to(dtype), torch.randn(9, 20).to(dtype)
    for x in (wide[..., ::2], wide[:, 1, :20], wide[0, 0, :20], wide[:, :1, :20]):
        out = product(x, weight, None, 1)
        assert out.shape == (*x.shape[:-1], 9)
        torch.testing.assert_close(out, torch.nn.functional.linear(x, weight), rtol=1e-2, atol=1e-2)


def test_infinity_and_nan_come_out_as_from_torch() -> None:
    """Bug: a block's neighbours take an overflow, or NaN becomes a number."""
    x, weight = torch.randn(3, 64), torch.randn(70, 64)
    x[1, 5], weight[40, 3] = torch.inf, torch.nan
    out, want = product(x, weight, None, 1), torch.nn.functional.linear(x, weight)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


def test_only_few_rows_of_large_weights_are_ours() -> None:
    """Bug: a prompt, or a weight in a dtype without a kernel, goes through a kernel that is slower or not there."""
    large = torch.empty(1024, 2048, dtype=torch.bfloat16)
    assert linear.worthwhile(large)
    assert not linear.worthwhile(large[:8])
    assert not linear.worthwhile(large.double())
    assert [rows for rows in range(40) if linear.is_faster(rows, large)] == [1, 2, 3, 4]
    assert [rows for rows in range(40) if linear.is_faster(rows, torch.empty(8, 20000, dtype=large.dtype))] == [1]
    assert not linear.is_faster(1, large.double())
