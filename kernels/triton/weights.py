"""Weights of a record as kernels read them: float weights as they are, codes turned into numbers in registers.

A step of a kernel takes COLUMNS (or DEPTH) weights of each row, whole groups where they are coded. A byte of 4-bit
codes holds weights j and 16 + j of its group, so its inputs come in two halves that meet the low and the high nibbles;
the other formats have one, given twice. Small floats are read as fp16 with their exponent in its place, which every
card and the interpreter know.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import RecordLayout
from moebius.kernels.formats import GROUP, SCALES

GROUP_SIZE: tl.constexpr = tl.constexpr(GROUP)
HALF: tl.constexpr = tl.constexpr(GROUP // 2)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INT8, INT4, E4M3, E2M1 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_CODES = {"int8": INT8.value, "int4": INT4.value, "e4m3": E4M3.value, "e2m1": E2M1.value}
_SCALES = {torch.uint8: tl.uint8, **TYPES}


@cache
def storage(layout: RecordLayout) -> Mapping[str, Any]:
    """Keyword arguments for every kernel that reads records of `layout`."""
    return {
        "H": layout.hidden,
        "INNER": layout.intermediate,
        "STRIDE": layout.nbytes,
        "BIASED": layout.biased,
        "BIAS": TYPES[layout.dtype],  # fp32 where the weights are coded
        "CODING": _coding(layout),
    }


def _coding(layout: RecordLayout) -> tuple[Any, ...]:
    """Bits of a code (0: floats), type of what is loaded, the code, type of scales, rows and columns of a block."""
    coding = layout.coding
    if coding is None:
        return 0, TYPES[layout.dtype], 0, tl.float32, 0, 0
    stored = tl.int8 if coding.code == "int8" else tl.uint8
    return coding.bits, stored, _CODES[coding.code], _SCALES[SCALES[coding.scale]], coding.rows, coding.columns


@cache
def offsets(layout: RecordLayout) -> Mapping[str, int]:
    """First byte of every part of a record by its name in capitals; -1 for those it lacks, which no kernel reads."""
    matrices = ("GATE", "UP", "DOWN")
    names = [name + suffix for name in matrices for suffix in ("", "_SCALE", "_ZERO", "_BIAS")]
    return dict.fromkeys(names, -1) | {name.upper(): part.offset for name, part in layout.parts().items()}


@cache
def of_matrices(layout: RecordLayout, *matrices: str) -> Mapping[str, int]:
    """The `offsets` of some matrices with their scales and biases."""
    return {name: offset for name, offset in offsets(layout).items() if name.split("_")[0].lower() in matrices}


@triton.jit
def part(record, OFFSET: tl.constexpr, TYPE: tl.constexpr):
    """The part of a record (pointer to uint8) that begins at OFFSET, as a pointer to TYPE."""
    return (record + OFFSET).to(tl.pointer_type(TYPE))


@triton.jit
def load_bias(record, OFFSET: tl.constexpr, TYPE: tl.constexpr, rows, N: tl.constexpr):
    """Biases of `rows` [R] below N, fp32 [R]."""
    return tl.load(part(record, OFFSET, TYPE) + rows, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def load_inputs(inputs, start, M: tl.constexpr, CODING: tl.constexpr, COLUMNS: tl.constexpr):
    """A vector's values from `start` on, in both halves, fp32 [1, COLUMNS], or [1, groups, bytes of a group]."""
    BITS: tl.constexpr = CODING[0]
    if BITS == 0:
        columns = start + tl.arange(0, COLUMNS)
        first = tl.load(inputs + columns, mask=columns < M, other=0.0).to(tl.float32)[None, :]
        second = first
    else:
        BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
        groups = tl.arange(0, COLUMNS // GROUP_SIZE)[None, :, None]
        columns = start + groups * GROUP_SIZE + tl.arange(0, BYTES)[None, None, :]
        first = tl.load(inputs + columns, mask=columns < M, other=0.0).to(tl.float32)
        second = first
        if BITS == 4:
            second = tl.load(inputs + columns + HALF, mask=columns + HALF < M, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def multiply_rows(
    record, MATRIX: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, CODING: tl.constexpr,
    rows, N: tl.constexpr, M: tl.constexpr, start, first, second, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of a matrix [N, M] with the inputs of one step, fp32 [R, COLUMNS], or summed by group [R, groups]."""
    BITS: tl.constexpr = CODING[0]
    if BITS == 0:
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < N)[:, None] & (columns < M)[None, :]
        tile = tl.load(part(record, MATRIX, CODING[1]) + rows[:, None] * M + columns[None, :], mask=inside, other=0.0)
        return tile.to(tl.float32) * first
    else:
        BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
        GROUPS: tl.constexpr = (M + GROUP_SIZE - 1) // GROUP_SIZE
        groups = tl.arange(0, COLUMNS // GROUP_SIZE) + start // GROUP_SIZE
        index = rows[:, None] * GROUPS + groups[None, :]
        inside = (rows < N)[:, None] & (groups < GROUPS)[None, :]
        codes = tl.load(
            part(record, MATRIX, CODING[1]) + index[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :],
            mask=inside[:, :, None],
            other=0,
        )
        block = _block(rows[:, None], groups[None, :], N, M, CODING[4], CODING[5])
        scale = _load_scale(record, SCALE, CODING[3], block, inside)
        zero = _load_zero(record, ZERO, block, inside)[:, :, None]
        if BITS == 8:
            products = _number(codes, zero, CODING[2]) * first
        else:
            products = _number(codes & 15, zero, CODING[2]) * first + _number(codes >> 4, zero, CODING[2]) * second
        return tl.sum(products, axis=2) * scale


@triton.jit
def _block(rows, groups, N: tl.constexpr, M: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Index of the block of weights that has groups of a matrix [N, M]; blocks of 0 rows or columns have all."""
    ACROSS: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS > 0 else (M + GROUP_SIZE - 1) // GROUP_SIZE * GROUP_SIZE
    DOWN: tl.constexpr = BLOCK_ROWS if BLOCK_ROWS > 0 else N
    return rows // DOWN * ((M + ACROSS - 1) // ACROSS) + groups * GROUP_SIZE // ACROSS


@triton.jit
def _load_scale(record, SCALE: tl.constexpr, SCALED: tl.constexpr, block, inside):
    """Scales of blocks, fp32; a byte is an exponent."""
    scale = tl.load(part(record, SCALE, SCALED) + block, mask=inside, other=0)
    if tl.uint8 == SCALED:
        exponent = scale.to(tl.int32)
        return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def _load_zero(record, ZERO: tl.constexpr, block, inside):
    """Zero points of blocks, fp32; 8 where the records have none."""
    if ZERO >= 0:
        return tl.load(part(record, ZERO, tl.uint8) + block, mask=inside, other=0).to(tl.float32)
    else:
        return tl.full(block.shape, 8.0, tl.float32)


@triton.jit
def _number(codes, zero, CODE: tl.constexpr):
    """What codes stand for without their scale, fp32; 4-bit codes one to a byte."""
    if CODE == E4M3:
        wide = codes.to(tl.int32)
        half = ((wide & 127) << 7 | (wide & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    elif CODE == E2M1:
        wide = codes.to(tl.int32)
        half = ((wide & 7) << 9 | (wide & 8) << 12).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 16384.0
    elif CODE == INT4:
        return codes.to(tl.float32) - zero
    else:
        return codes.to(tl.float32)


@triton.jit
def depth_of(start, CODING: tl.constexpr, DEPTH: tl.constexpr):
    """Columns of the first half of a step of `multiply_tile`; those of the second half are HALF further."""
    if CODING[0] == 4:
        half = tl.arange(0, DEPTH // 2)
        return start + half // HALF * GROUP_SIZE + half % HALF
    else:
        return start + tl.arange(0, DEPTH)


@triton.jit
def multiply_tile(
    total, first, second, record, MATRIX: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, CODING: tl.constexpr,
    rows, N: tl.constexpr, M: tl.constexpr, start, TYPE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``total + inputs @ matrix[rows].T`` over one step: total fp32 [P, R], inputs TYPE [P, columns of `depth_of`]."""
    BITS: tl.constexpr = CODING[0]
    if BITS == 0:
        depth = start + tl.arange(0, DEPTH)
        inside = (depth < M)[:, None] & (rows < N)[None, :]
        index = rows[None, :] * M + depth[:, None]  # row-major [N, M], read transposed
        tile = tl.load(part(record, MATRIX, CODING[1]) + index, mask=inside, other=0.0).to(TYPE)
        total = tl.dot(first, tile, total, input_precision="ieee")
    else:
        BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
        GROUPS: tl.constexpr = (M + GROUP_SIZE - 1) // GROUP_SIZE
        WIDTH: tl.constexpr = DEPTH // GROUP_SIZE * BYTES
        groups = (tl.arange(0, DEPTH // GROUP_SIZE) + start // GROUP_SIZE)[:, None, None]
        index = rows[None, None, :] * GROUPS + groups
        inside = (rows < N)[None, None, :] & (groups < GROUPS)
        codes = tl.load(
            part(record, MATRIX, CODING[1]) + index * BYTES + tl.arange(0, BYTES)[None, :, None], mask=inside, other=0
        )
        block = _block(rows[None, None, :], groups, N, M, CODING[4], CODING[5])
        scale = _load_scale(record, SCALE, CODING[3], block, inside)
        zero = _load_zero(record, ZERO, block, inside)
        if BITS == 8:
            tile = (_number(codes, zero, CODING[2]) * scale).to(TYPE)
            total = tl.dot(first, tl.reshape(tile, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
        else:
            low = (_number(codes & 15, zero, CODING[2]) * scale).to(TYPE)
            high = (_number(codes >> 4, zero, CODING[2]) * scale).to(TYPE)
            total = tl.dot(first, tl.reshape(low, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
            total = tl.dot(second, tl.reshape(high, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
    return total
