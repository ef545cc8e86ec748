"""Weights of a record as kernels read them: float weights as they are, codes turned into numbers in registers.

`decode` reads units of 16 bytes, the most that a thread loads at once, and sums within them before anything else; so
every thread has whole units and needs no other. `prefill` reads DEPTH weights of each row, whole groups where they are
coded. A byte of 4-bit codes holds weights j and 16 + j of its group, so its inputs come in two halves that meet the low
and the high nibbles; the other formats have one, given twice.
Small floats are read as fp16 with their exponent in its place, which every card and the interpreter know.
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
from moebius.kernels.triton.ptx import halve_byte, halve_nibble, spread_byte, spread_nibble

GROUP_SIZE: tl.constexpr = tl.constexpr(GROUP)
HALF: tl.constexpr = tl.constexpr(GROUP // 2)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INT8, INT4, E4M3, E2M1 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_CODES = {"int8": INT8.value, "int4": INT4.value, "e4m3": E4M3.value, "e2m1": E2M1.value}
_SCALES = {torch.uint8: tl.uint8, **TYPES}
_UNIT = 16  # bytes


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
    """Bits of a code (0: floats), type of what is loaded, the code, type of scales, rows and columns of a block, and
    how many elements and weights a unit has."""
    coding = layout.coding
    if coding is None:
        elements = _UNIT // layout.dtype.itemsize
        return 0, TYPES[layout.dtype], 0, tl.float32, 0, 0, elements, elements
    block = _SCALES[SCALES[coding.scale]], coding.rows, coding.columns
    return coding.bits, tl.uint8, _CODES[coding.code], *block, _UNIT, 8 * _UNIT // coding.bits


def units_of(layout: RecordLayout, columns: int) -> int:
    """How many units so many weights of a row take."""
    return -(-columns // _coding(layout)[-1])


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
    """Biases of those `rows` that are below N, fp32 in their shape."""
    return tl.load(part(record, OFFSET, TYPE) + rows, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def load_inputs(inputs, unit, live, M: tl.constexpr, CODING: tl.constexpr):
    """What meets `unit` of vectors of M values: both halves, fp32 [A, 1, U, values of a half], and sums [A, 1, U, 1].

    Args:
        inputs: pointer, or pointers [A, 1, 1, 1].
        unit: numbers of units, [1, 1, U, 1].
        live: which of the vectors there are, as `inputs`.
    """
    STEP: tl.constexpr = HALF if CODING[0] == 4 else CODING[7]
    columns = unit * CODING[7] + tl.arange(0, STEP)[None, None, None, :]
    first = tl.load(inputs + columns, mask=live & (columns < M), other=0.0).to(tl.float32)
    second = first
    total = first
    if CODING[0] == 4:
        second = tl.load(inputs + columns + HALF, mask=live & (columns + HALF < M), other=0.0).to(tl.float32)
        total = first + second
    return first, second, tl.sum(total, axis=3, keep_dims=True)


@triton.jit
def load_units(
    record, rows, number, unit, live,
    MATRIX: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CODING: tl.constexpr, STEP: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Units of ``rows + number`` of a matrix [N, M] as they are stored, [A, R, U, elements of a unit].

    Args:
        record: pointer, or pointers [A, 1, 1, 1].
        rows: [1, R, 1, 1], from a multiple of STEP on.
        number: known when compiled, so that it costs no address.
        unit, live: as for `load_inputs`; UNITS are loaded at once.
    """
    GROUPS: tl.constexpr = (M + GROUP_SIZE - 1) // GROUP_SIZE
    WIDTH: tl.constexpr = M if CODING[0] == 0 else GROUPS * (GROUP_SIZE * CODING[6] // CODING[7])
    columns = unit * CODING[6] + tl.arange(0, CODING[6])[None, None, None, :]
    inside = live
    if WIDTH % (UNITS * CODING[6]) != 0:
        inside = inside & (columns < WIDTH)
    if N % STEP != 0:
        inside = inside & (rows + number < N)
    return tl.load(part(record, MATRIX, CODING[1]) + (rows * WIDTH + columns) + number * WIDTH, mask=inside, other=0)


@triton.jit
def multiply_units(
    stored, first, second, sums, record, rows, unit, live,
    SCALE: tl.constexpr, ZERO: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CODING: tl.constexpr,
):  # fmt: skip
    """Sums over each of the `load_units` of its products with the `load_inputs`, fp32 [A, R, U, 1]."""
    if CODING[0] == 0:
        return tl.sum(stored.to(tl.float32) * first, axis=3, keep_dims=True)
    else:
        total = tl.sum(_value(stored, CODING[2], False) * first, axis=3, keep_dims=True)
        if CODING[0] == 4:
            total += tl.sum(_value(stored, CODING[2], True) * second, axis=3, keep_dims=True)
        block = _block(rows, unit * CODING[7] // GROUP_SIZE, N, M, CODING[4], CODING[5])
        inside = live & (rows < N) & (unit * CODING[7] < M)
        factor, less = _to_number(record, SCALE, ZERO, CODING, block, inside)
        return factor * total - less * sums


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
def _to_number(record, SCALE: tl.constexpr, ZERO: tl.constexpr, CODING: tl.constexpr, block, inside):
    """What turns a `_value` of `block` into a weight, ``value * factor - less``; fp32."""
    scale = _load_scale(record, SCALE, CODING[3], block, inside)
    if CODING[2] == INT4:
        zero = tl.load(part(record, ZERO, tl.uint8) + block, mask=inside, other=0).to(tl.float32) if ZERO >= 0 else 8.0
        return scale * 32.0, scale * (zero + 16.0)
    elif CODING[2] == E4M3:
        return scale * 256.0, 0.0
    elif CODING[2] == E2M1:
        return scale * 16384.0, 0.0
    else:
        return scale, 0.0


@triton.jit
def _value(codes, CODE: tl.constexpr, HIGH: tl.constexpr):
    """What codes become with few instructions, fp32, see `_to_number`; 4-bit codes one to a byte, its high half or low.

    int8: the number. int4: 0.5 + code / 32. Small floats: the fp16 that their bits make.
    """
    if CODE == INT8:
        return spread_byte(codes)
    elif CODE == INT4:
        return spread_nibble(codes, HIGH)
    elif CODE == E4M3:
        return halve_byte(codes)
    else:
        return halve_nibble(codes, HIGH)


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
        factor, less = _to_number(record, SCALE, ZERO, CODING, block, inside)
        low = (_value(codes, CODING[2], False) * factor - less).to(TYPE)
        total = tl.dot(first, tl.reshape(low, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
        if BITS == 4:
            high = (_value(codes, CODING[2], True) * factor - less).to(TYPE)
            total = tl.dot(second, tl.reshape(high, [WIDTH, rows.shape[0]]), total, input_precision="ieee")
    return total
