"""What kernels say in PTX, carried out instruction by instruction: Triton's interpreter knows only the other way."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from moebius.kernels.triton import ptx

BYTES = np.arange(256, dtype=np.uint32)
LOW, HIGH = BYTES & 15, BYTES >> 4
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def carry_out(code: str, word: int) -> list[int]:
    """The outputs, four or two, for an input of 32 bits, which has the number after theirs."""
    count = 4 if "$4" in code else 2
    found = {f"${count}": word}

    def value(name: str) -> int:
        return found[name] if name in found else int(name, 0)

    body = re.sub(r"\.reg[^;]*;", "", code.strip()[1:-1])
    for operation, target, *sources in (re.split(r"[,\s]+", one.strip()) for one in body.split(";") if one.strip()):
        a, b = value(sources[0]), value(sources[1])
        match operation:
            case "and.b32":
                result = a & b
            case "xor.b32":
                result = a ^ b
            case "or.b32":
                result = a | b
            case "shl.b32":
                result = a << b & 0xFFFFFFFF
            case "shr.b32":
                result = a >> b
            case "prmt.b32":
                chosen = value(sources[2])
                assert not chosen & 0x8888, "would copy a sign"
                eight = (a | b << 32).to_bytes(8, "little")
                result = int.from_bytes(bytes(eight[chosen >> 4 * place & 7] for place in range(4)), "little")
            case _:
                raise NotImplementedError(operation)
        found[target] = result
    return [found[f"${number}"] for number in range(count)]


def outputs(code: str) -> np.ndarray:
    """For every byte, in every place of a word: its 32 or 16 bits, uint32 [256, 4]."""
    order = np.stack([BYTES, 255 - BYTES, BYTES ^ 85, BYTES * 7 % 256])
    words = (order << np.arange(0, 32, 8, dtype=np.uint32)[:, None]).sum(0)
    rows = np.array([carry_out(code, int(word)) for word in words], np.uint32)
    if rows.shape[1] == 2:
        rows = rows.view(np.uint16).astype(np.uint32)
    found = np.empty((256, 4), np.uint32)
    for place in range(4):
        found[order[place], place] = rows[:, place]
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ptx.PLACE_BYTE, BYTES.astype(np.uint8).view(np.int8).astype(np.float32) + 2**23 + 128),
        (ptx.PLACE_LOW, 0.5 + LOW / 32),
        (ptx.PLACE_HIGH, 0.5 + HIGH / 32),
    ],
    ids=["int8", "low nibble", "high nibble"],
)
def test_integers_become_what_they_stand_for(code, expected) -> None:
    """A byte that is taken from another place, or put into one; a nibble of the other half."""
    assert (outputs(code.value).view(np.float32) == expected.astype(np.float32)[:, None]).all()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ptx.HALVE_E4M3, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy() / 256),
        (ptx.HALVE_LOW, E2M1[LOW] / 16384),
        (ptx.HALVE_HIGH, E2M1[HIGH] / 16384),
    ],
    ids=["e4m3", "low e2m1", "high e2m1"],
)
def test_small_floats_become_what_they_stand_for(code, expected) -> None:
    """The same; not-a-number is read as 480 here as in the reference for finite records."""
    found = outputs(code.value).astype(np.uint16).view(np.float16).astype(np.float64)
    known = ~np.isnan(expected)
    assert (found[known] == expected[known, None]).all()
