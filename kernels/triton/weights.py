"""Weights of a record as kernels read them: float weights as they are, quantised ones unpacked in registers.

A step of a kernel takes COLUMNS (or DEPTH) weights of each row, whole groups where they are quantised. A byte of int4
holds weights j and 16 + j of its group, so its inputs come in two halves that meet the low and the high nibbles; the
other formats have one, given twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import RecordLayout
from moebius.kernels.formats import GROUP

GROUP_SIZE: tl.constexpr = tl.constexpr(GROUP)
HALF: tl.constexpr = tl.constexpr(GROUP // 2)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CODES = {0: None, 8: tl.int8, 4: tl.uint8}


@cache
def storage(layout: RecordLayout) -> Mapping[str, Any]:
    """Keyword arguments for every kernel that reads records of `layout`."""
    bits = 0 if layout.coding is None else layout.coding.bits
    return {
        "H": layout.hidden,
        "INNER": layout.intermediate,
        "STRIDE": layout.nbytes,
        "BIASED": layout.biased,
        "BITS": bits,
        "STORED": _CODES[bits] or TYPES[layout.dtype],
        "BIAS": TYPES[layout.dtype],  # fp32 where the weights are quantised
    }


@cache
def offsets(layout: RecordLayout) -> Mapping[str, int]:
    """First byte of every part of a record by its name in capitals; 0 for those it lacks, which no kernel reads."""
    matrices = ("GATE", "UP", "DOWN")
    names = [name + suffix for name in matrices for suffix in ("", "_SCALE", "_BIAS")]
    return dict.fromkeys(names, 0) | {name.upper(): part.offset for name, part in layout.parts().items()}


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
def load_inputs(inputs, start, M: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """A vector's values from `start` on, in both halves, fp32 [1, COLUMNS], or [1, groups, bytes of a group]."""
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
    record, MATRIX: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr, BITS: tl.constexpr,
    rows, N: tl.constexpr, M: tl.constexpr, start, first, second, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of a matrix [N, M] with the inputs of one step, fp32 [R, COLUMNS], or summed by group [R, groups]."""
    if BITS == 0:
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < N)[:, None] & (columns < M)[None, :]
        tile = tl.load(part(record, MATRIX, STORED) + rows[:, None] * M + columns[None, :], mask=inside, other=0.0)
        return tile.to(tl.float32) * first
    else:
        BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
        GROUPS: tl.constexpr = (M + GROUP_SIZE - 1) // GROUP_SIZE
        groups = tl.arange(0, COLUMNS // GROUP_SIZE) + start // GROUP_SIZE
        index = rows[:, None] * GROUPS + groups[None, :]
        inside = (rows < N)[:, None] & (groups < GROUPS)[None, :]
        codes = tl.load(
            part(record, MATRIX, STORED) + index[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :],
            mask=inside[:, :, None],
            other=0,
        )
        scale = tl.load(part(record, SCALE, tl.float16) + index, mask=inside, other=0.0).to(tl.float32)
        if BITS == 8:
            products = codes.to(tl.float32) * first
        else:
            products = ((codes & 15).to(tl.float32) - 8.0) * first + ((codes >> 4).to(tl.float32) - 8.0) * second
        return tl.sum(products, axis=2) * scale


@triton.jit
def depth_of(start, BITS: tl.constexpr, DEPTH: tl.constexpr):
    """Columns of the first half of a step of `multiply_tile`; those of the second half are HALF further."""
    if BITS == 4:
        half = tl.arange(0, DEPTH // 2)
        return start + half // HALF * GROUP_SIZE + half % HALF
    else:
        return start + tl.arange(0, DEPTH)


@triton.jit
def multiply_tile(
    total, first, second, record, MATRIX: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr, BITS: tl.constexpr,
    rows, N: tl.constexpr, M: tl.constexpr, start, TYPE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``total + inputs @ matrix[rows].T`` over one step: total fp32 [P, R], inputs TYPE [P, columns of `depth_of`]."""
    if BITS == 0:
        depth = start + tl.arange(0, DEPTH)
        inside = (depth < M)[:, None] & (rows < N)[None, :]
        index = rows[None, :] * M + depth[:, None]  # row-major [N, M], read transposed
        tile = tl.load(part(record, MATRIX, STORED) + index, mask=inside, other=0.0).to(TYPE)
        total = tl.dot(first, tile, total, input_precision="ieee")
    else:
        BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
        GROUPS: tl.constexpr = (M + GROUP_SIZE - 1) // GROUP_SIZE
        WIDTH: tl.constexpr = DEPTH // GROUP_SIZE * BYTES
        groups = (tl.arange(0, DEPTH // GROUP_SIZE) + start // GROUP_SIZE)[:, None, None]
        index = rows[None, None, :] * GROUPS + groups
        inside = (rows < N)[None, None, :] & (groups < GROUPS)
        codes = tl.load(
            part(record, MATRIX, STORED) + index * BYTES + tl.arange(0, BYTES)[None, :, None], mask=inside, other=0
        )
        scale = tl.load(part(record, SCALE, tl.float16) + index, mask=inside, other=0.0).to(tl.float32)
        if BITS == 8:
            tile = (codes.to(tl.float32) * scale).to(TYPE)
            total = tl.dot(first, tl.reshape(tile, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
        else:
            low = (((codes & 15).to(tl.float32) - 8.0) * scale).to(TYPE)
            high = (((codes >> 4).to(tl.float32) - 8.0) * scale).to(TYPE)
            total = tl.dot(first, tl.reshape(low, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
            total = tl.dot(second, tl.reshape(high, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
    return total
