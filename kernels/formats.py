"""How experts are stored: as plain floats, or as codes with scales.

A coded weight is ``(number of its code - zero point) * scale``. A `Coding` says what a code means, which weights share
a scale, and in which type scales are stored; the formats of today's quantised checkpoints and our own differ in nothing
else. Its `name` says it all, so that a layout can be written down: ``e4m3-128x128-fp32``, ``int4-1x128-fp16-zeros``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

GROUP = 32  # codes of a row are stored in groups of so many, the last one padded

FLOATS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODES: dict[str, int] = {"int8": 8, "int4": 4, "e4m3": 8, "e2m1": 4}  # bits of a code
SCALES: dict[str, torch.dtype] = {**FLOATS, "e8m0": torch.uint8}  # e8m0: the byte b stands for 2 ** (b - 127)


@dataclass(frozen=True, slots=True)
class Coding:
    """Codes and scales of the matrices of an expert.

    Args:
        code: what a code means. int8: -128..127; int4: 0..15, less 8 or less the zero point; e4m3: the 8-bit float of
            OCP FP8 without infinities; e2m1: the 4-bit float of OCP MX.
        rows, columns: size of the block of weights that share a scale; 0 means all. Columns come in whole groups.
        scale: type of the scales, one of `SCALES`.
        zeros: whether each block has a zero point, uint8, beside its scale (int4 only).
        rounds: whether the CPU also rounds activations to integers (our own int8 and int4).
    """

    code: str
    rows: int
    columns: int
    scale: str
    zeros: bool = False
    rounds: bool = False

    def __post_init__(self) -> None:
        if self.code not in CODES or self.scale not in SCALES or self.columns % GROUP or self.rows < 0:
            raise ValueError(
                f"{self.name!r} is no format: codes are {', '.join(CODES)}, scales {', '.join(SCALES)}, and a scale "
                f"serves a multiple of {GROUP} columns, or all (0)"
            )
        if self.zeros and self.code != "int4":
            raise ValueError(f"{self.name!r} is no format: only int4 has zero points")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return CODES[self.code]

    @property
    def name(self) -> str:
        """The name of the format; `coding` reads it."""
        known = next((name for name, coding in _NAMED.items() if coding == self), None)
        return known or f"{self.code}-{self.rows}x{self.columns}-{self.scale}" + "-zeros" * self.zeros

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix has along its rows and columns."""
        n, m = shape
        return -(-n // (self.rows or n)), -(-m // (self.columns or m))


_NAMED: dict[str, Coding] = {}
_NAMED |= {
    "int8": Coding("int8", 1, 32, "fp16", rounds=True),
    "int4": Coding("int4", 1, 32, "fp16", rounds=True),
    "fp8": Coding("e4m3", 128, 128, "fp32"),  # DeepSeek-V3, Qwen3 and GLM releases
    "mxfp4": Coding("e2m1", 1, 32, "e8m0"),  # gpt-oss
}
FORMATS: tuple[str, ...] = (*FLOATS, *_NAMED)  # those that weights can be converted to by name
_SPELLED = re.compile(r"(\w+)-(\d+)x(\d+)-(\w+?)(-zeros)?")


@cache
def coding(format: str) -> Coding | None:
    """What a format's codes and scales are; None for the float formats.

    Raises:
        ValueError: no such format.
    """
    if format in FLOATS:
        return None
    if format in _NAMED:
        return _NAMED[format]
    if (match := _SPELLED.fullmatch(format)) is None:
        raise ValueError(f"expert format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    code, rows, columns, scale, zeros = match.groups()
    return Coding(code, int(rows), int(columns), scale, zeros=zeros is not None)
