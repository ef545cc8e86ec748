"""The compiled quantiser against the one in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.formats import coding
from moebius.kernels.packing import pack, quantize, unpack_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _packed(matrix: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as `pack` writes them for a host tensor [n, m]."""
    layout = RecordLayout.of(ExpertSpec(matrix.shape[1], matrix.shape[0], gated=False), format)
    records = torch.zeros(layout.nbytes, dtype=torch.uint8)
    pack(layout, records, {"up": matrix})
    stored = layout.stored(records)
    return stored["up"], stored["up_scale"]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 100) | st.sampled_from([128, 512]), bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES), size=st.sampled_from([1.0, 1e-3, 1e-6, 300.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_finds_what_torch_finds(rows: int, columns: int, bits: int, dtype: torch.dtype, size: float, seed: int) -> None:
    """Bug: another rounding, another start or order of the search; a tail that reads the next row."""
    matrix = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    codes, scales = _packed(matrix, f"int{bits}")
    expected_codes, expected_scales = quantize(matrix, bits)
    # Sums in another order decide between two scales that are equally good, or round one to its neighbour.
    assert (scales != expected_scales).sum() <= 1 + 0.001 * scales.numel()
    assert (codes != expected_codes).sum() <= 16 + 0.001 * codes.numel()
    error, expected = (
        (unpack_matrix(coding(f"int{bits}"), columns, *pair).double() - matrix.double()).norm()
        for pair in ((codes, scales), (expected_codes, expected_scales))
    )
    assert error <= expected * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("bits", [8, 4])
def test_ties_and_extremes_are_decided_as_in_torch(bits: int) -> None:
    """Bug: of two entries of the same magnitude the other one's sign is used; a zero group divides by zero."""
    matrix = torch.zeros(7, 64)
    matrix[1, 3], matrix[2] = 1.0, 1e-8
    matrix[3, ::2], matrix[3, 1::2] = 100.0, -100.0
    matrix[4, ::2], matrix[4, 1::2] = -100.0, 100.0
    matrix[5, 40], matrix[6, 20], matrix[6, 60] = -3e38, 65504.0, -1e-30
    codes, scales = _packed(matrix, f"int{bits}")
    expected_codes, expected_scales = quantize(matrix, bits)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_in_its_group(bits: int, value: float) -> None:
    """Bug: a broken checkpoint becomes a plausible one, or its NaN spreads to other groups."""
    matrix = torch.randn(3, 96)
    matrix[1, 40] = value
    codes, scales = _packed(matrix, f"int{bits}")
    finite = torch.isfinite(unpack_matrix(coding(f"int{bits}"), 96, codes, scales))
    assert not finite[1, 40]
    assert finite[[0, 2]].all()
    assert finite[1, :32].all()
    assert finite[1, 64:].all()


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_strides_and_dtypes_change_nothing(bits: int, threads: None) -> None:
    """Bug: a thread writes another's rows; a transposed or a double matrix is read as if it were contiguous."""
    matrix = torch.randn(130, 70, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    one = _packed(matrix, f"int{bits}")
    torch.set_num_threads(4)
    for same in (matrix, matrix.T.contiguous().T, matrix.double(), matrix.clone().requires_grad_()):
        for part, expected in zip(_packed(same, f"int{bits}"), one, strict=True):
            assert torch.equal(part, expected)
