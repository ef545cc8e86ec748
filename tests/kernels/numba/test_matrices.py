"""Compiled code for whole matrices of codes, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.encoding import decode, encode, to_bytes
from moebius.kernels.formats import Coding
from moebius.kernels.numba import matrices

CODINGS = [
    Coding("e4m3", 128, 128, "fp32"), Coding("e4m3", 3, 32, "bf16"), Coding("e4m3", 0, 0, "fp32"),
    Coding("e2m1", 1, 32, "e8m0"), Coding("int4", 1, 64, "fp16"), Coding("int4", 1, 128, "bf16", zeros=True),
    Coding("int8", 1, 0, "bf16"), Coding("int8", 1, 32, "fp32"),
]  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    coding=st.sampled_from(CODINGS), rows=st.integers(1, 9), columns=st.integers(1, 300),
    size=st.sampled_from([1.0, 1e-30, 1e30]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_numbers_are_bitwise_those_of_torch(coding: Coding, rows: int, columns: int, size: float, seed: int) -> None:
    """Bug: the scale of a neighbouring block; a product in another order, which rounds or overflows; a short tail."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales, zeros = encode(coding, matrix)
    if scales.dtype in (torch.float32, torch.bfloat16):
        scales *= size
    found = matrices.decode(coding, to_bytes(codes, coding.bits), columns, scales, zeros)
    assert torch.equal(found, decode(coding, codes, scales, zeros))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), groups=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_pairs_are_parted(rows: int, groups: int, seed: int) -> None:
    """Bug: nibbles exchanged, or the halves of a group; rows between which others lie, as gate's and up's."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 256, (2 * rows, 16 * groups), dtype=torch.uint8, generator=generator)[1::2]
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    found = torch.empty(rows, 16 * groups, dtype=torch.uint8)
    matrices.part_pairs(pairs, found)
    assert torch.equal(found, to_bytes(codes, 4))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [0, 63, 70])
def test_nan_is_found_wherever_it_is(code: int, place: int) -> None:
    """Bug: the codes behind the last whole register are not searched, or those with a sign."""
    codes = torch.full((71,), 0x7E, dtype=torch.uint8)
    assert not matrices.has_nan(codes)
    codes[place] = code
    assert matrices.has_nan(codes)
