"""Codes into numbers and numbers into codes, in torch: what every kernel that reads codes is compared with.

Codes travel here one to a byte, uint8 [..., n, m], whatever a record or a checkpoint makes of them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from moebius.kernels.formats import GROUP, SCALES, Coding

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of codes 0..7; bit 3 is the sign
_LARGEST = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}
_HALF = GROUP // 2


def to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n, m] as a record stores them: rows padded to whole groups, 4-bit codes two to a byte."""
    padding = -codes.shape[-1] % GROUP
    padded = F.pad(codes, (0, padding)) if padding else codes  # which would copy
    if bits == 8:
        return padded
    groups = padded.unflatten(-1, (-1, 2, _HALF))
    return (groups[..., 0, :] | groups[..., 1, :] << 4).flatten(-2)


def from_bytes(stored: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """The codes [..., n, columns] of what `to_bytes` made."""
    if bits == 4:
        groups = stored.unflatten(-1, (-1, _HALF))
        stored = torch.cat([groups & 15, groups >> 4], dim=-1).flatten(-2)
    return stored[..., :columns]


def numbers(codes: torch.Tensor, code: str) -> torch.Tensor:
    """What codes stand for without scale and zero point, fp32; of int4 that is 0..15."""
    match code:
        case "int8":
            return codes.view(torch.int8).float()
        case "e4m3":
            return codes.view(torch.float8_e4m3fn).float()
        case "e2m1":
            values = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float32, device=codes.device)
            return values[codes.int()]
    return codes.float()


def scale_numbers(scales: torch.Tensor, scale: str) -> torch.Tensor:
    """Stored scales as fp32."""
    if scale != "e8m0":
        return scales.float()
    bits = scales.int() << 23  # an exponent in its place; 0 stands for the subnormal 2 ** -127
    return torch.where(scales == 0, 0x400000, bits).view(torch.float32)


def decode(
    coding: Coding, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """``(number - zero) * scale`` in fp32: the weights [..., n, m] that a checkpoint stands for.

    Args:
        codes: uint8 [..., n, m].
        scales, zeros: as stored, [..., *coding.blocks((n, m))].
    """
    shape = (codes.shape[-2], codes.shape[-1])
    values = numbers(codes, coding.code)
    if coding.code == "int4":
        values = values - (8.0 if zeros is None else _spread(zeros.float(), coding, shape))
    return values * _spread(scale_numbers(scales, coding.scale), coding, shape)


def _spread(blocks: torch.Tensor, coding: Coding, shape: tuple[int, int]) -> torch.Tensor:
    """What belongs to blocks, for each row, and each column unless one block has them all."""
    rows, columns = coding.rows or shape[0], coding.columns or shape[1]
    if blocks.shape[-2] > 1:
        blocks = blocks.repeat_interleave(rows, -2)[..., : shape[0], :]
    return blocks.repeat_interleave(columns, -1)[..., : shape[1]] if blocks.shape[-1] > 1 else blocks


def encode(coding: Coding, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a matrix [n, m] to the nearest codes, with scales that map each block's range to that of the codes.

    Scales in e8m0 follow the OCP MX specification: the power of two that brings the largest magnitude into the range of
    the largest code, which may then be clipped.

    Returns:
        codes uint8 [n, m], scales and zero points as stored.
    """
    shape = (matrix.shape[-2], matrix.shape[-1])
    blocks = _in_blocks(matrix.float(), coding)  # [rows of blocks, columns of blocks, weights of a block]
    largest = blocks.abs().amax(-1)
    zeros = None
    if coding.zeros:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = _stored((high - low) / 15, coding)
        inverse = _inverse(scale_numbers(scales, coding.scale))
        zeros = (-low * inverse).round().clamp(0, 15).to(torch.uint8)
    elif coding.scale == "e8m0":
        exponent = torch.frexp(largest).exponent - 1 - int(math.log2(_LARGEST[coding.code]))
        scales = torch.where(largest > 0, exponent + 127, 127).clamp(0, 254).to(torch.uint8)
    else:
        scales = _stored(largest / _LARGEST[coding.code], coding)
    scaled = matrix.float() * _spread(_inverse(scale_numbers(scales, coding.scale)), coding, shape)
    if zeros is not None:
        scaled = scaled + _spread(zeros.float(), coding, shape)
    return _nearest(scaled, coding), scales, zeros


def _in_blocks(matrix: torch.Tensor, coding: Coding) -> torch.Tensor:
    n, m = matrix.shape
    rows, columns = coding.rows or n, coding.columns or m
    padded = F.pad(matrix, (0, -m % columns, 0, -n % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def _stored(scales: torch.Tensor, coding: Coding) -> torch.Tensor:
    return scales.to(SCALES[coding.scale])


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def _nearest(scaled: torch.Tensor, coding: Coding) -> torch.Tensor:
    match coding.code:
        case "int8":
            return scaled.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        case "e4m3":
            return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        case "e2m1":
            middles = [(a + b) / 2 for a, b in pairwise(E2M1)]
            code = torch.bucketize(
                scaled.abs().contiguous(), torch.tensor(middles, dtype=torch.float32, device=scaled.device)
            )
            return (code | (scaled < 0).int() << 3).to(torch.uint8)
    return (scaled if coding.zeros else scaled + 8).round().clamp(0, 15).to(torch.uint8)
