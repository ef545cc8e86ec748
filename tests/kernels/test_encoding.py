"""Codes and numbers: every code against the formats' definitions, every layout of scales against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.encoding import decode, encode, from_bytes, numbers, scale_numbers, to_bytes
from moebius.kernels.formats import CODES, Coding, coding

CODINGS = [
    Coding("e4m3", 128, 128, "fp32"),
    Coding("e4m3", 3, 32, "bf16"),
    Coding("e4m3", 1, 0, "fp16"),
    Coding("e4m3", 0, 0, "fp32"),
    Coding("e4m3", 32, 64, "e8m0"),
    Coding("e2m1", 1, 32, "e8m0"),
    Coding("int4", 1, 64, "fp16"),
    Coding("int4", 1, 128, "bf16", zeros=True),
    Coding("int4", 1, 0, "fp16", zeros=True),
    Coding("int8", 1, 0, "bf16"),
    Coding("int8", 1, 32, "fp32"),
]


def _float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    sign, code = code >> (exponent_bits + mantissa_bits), code & ((1 << (exponent_bits + mantissa_bits)) - 1)
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    magnitude = (bool(exponent) + mantissa / (1 << mantissa_bits)) * 2.0 ** (max(exponent, 1) - bias)
    return -magnitude if sign else magnitude


def test_every_code_stands_for_its_number() -> None:
    """Bug: a wrong table entry, sign or bias."""
    every = torch.arange(256, dtype=torch.uint8)
    finite = (every & 127) != 127
    e4m3 = torch.tensor([_float(code, 4, 3, 7) for code in range(256)])
    assert torch.equal(numbers(every, "e4m3")[finite], e4m3[finite])
    assert numbers(every, "e4m3")[~finite].isnan().all()
    assert numbers(every[:16], "e2m1").tolist() == [_float(code, 2, 1, 1) for code in range(16)]
    assert numbers(every, "int8").tolist() == [*range(128), *range(-128, 0)]
    assert numbers(every[:16], "int4").tolist() == list(range(16))


def test_scales_of_one_byte_are_powers_of_two() -> None:
    """Bug: the bias of the exponent, or 2 ** -127, which fp32 holds only as a subnormal."""
    scales = scale_numbers(torch.arange(255, dtype=torch.uint8), "e8m0").double()
    assert torch.equal(scales, 2.0 ** (torch.arange(255, dtype=torch.float64) - 127))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), columns=st.integers(1, 100), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_bytes_hold_all_codes(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, rows, columns), generator=torch.Generator().manual_seed(seed))
    stored = to_bytes(codes.to(torch.uint8), bits)
    assert stored.shape == (2, rows, -(-columns // 32) * 4 * bits)
    assert torch.equal(from_bytes(stored, columns, bits), codes)


@pytest.mark.parametrize("kind", CODINGS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(5, 33), (129, 260), (32, 64)])
def test_each_weight_takes_the_scale_of_its_block(kind: Coding, shape: tuple[int, int]) -> None:
    """Bug: scales spread along the wrong axis, or cut at the wrong end where blocks are not whole."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 127 if kind.bits == 8 else 16, shape, generator=generator).to(torch.uint8)
    blocks = kind.blocks(shape)
    _, scales, _ = encode(kind, torch.randn(shape, generator=generator) * torch.rand(shape[0], 1))
    zeros = torch.randint(0, 16, blocks, generator=generator).to(torch.uint8) if kind.zeros else None
    assert scales.shape == blocks
    got = decode(kind, codes, scales, zeros)
    values, factors = numbers(codes, kind.code), scale_numbers(scales, kind.scale)
    for i in range(0, shape[0], 7):
        for j in range(0, shape[1], 5):
            block = i // (kind.rows or shape[0]), j // (kind.columns or shape[1])
            zero = (8.0 if zeros is None else float(zeros[block])) if kind.code == "int4" else 0.0
            assert got[i, j] == (values[i, j] - zero) * factors[block]


@pytest.mark.parametrize("kind", CODINGS, ids=lambda kind: kind.name)
def test_rounding_is_as_good_as_the_codes(kind: Coding) -> None:
    """Bug: scales that clip, or leave half of the codes unused; zero blocks that become NaN."""
    matrix = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    matrix[:, :128] = 0
    restored = decode(kind, *encode(kind, matrix))
    bound = {"e4m3": 0.04, "e2m1": 0.14, "int8": 0.02, "int4": 0.16}[kind.code]
    assert (restored - matrix).norm() <= bound * matrix.norm()
    assert (restored[:, :128] == 0).all()


def test_names_are_read_back() -> None:
    for kind in [*CODINGS, *(coding(name) for name in ("int8", "int4", "fp8", "mxfp4"))]:
        assert kind is not None
        assert coding(kind.name) == kind
    assert coding("bf16") is None
    assert {kind.code for kind in CODINGS} == set(CODES)


@pytest.mark.parametrize(
    "name", ["int3", "e4m3", "e4m3-1x30-fp32", "int8-1x32-fp16-zeros", "int4-1x32-fp8", "b-1x32-fp16"]
)
def test_what_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="format"):
        coding(name)
