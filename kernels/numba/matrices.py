"""Whole matrices of codes in host memory: into the order of records, into numbers, and searched for NaN.

On the calling thread, without Python's lock; for `moebius.kernels.packing`, which has all of it in torch, too.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types

from moebius.kernels.formats import GROUP, Coding
from moebius.kernels.numba.coded import numbers_of, scale_index, zero_at
from moebius.kernels.numba.decoding import (
    E2M1_CODE,
    E4M3_CODE,
    INT4_CODE,
    INT8_CODE,
    SCALE_KINDS,
    group_bytes,
    scale_at,
    unit_of,
)
from moebius.kernels.numba.jit import entry, helper, intrinsic
from moebius.kernels.numba.memory import peek
from moebius.kernels.numba.simd import LANES, mul, splat, store

_CODE_KINDS = {"int8": 0, "int4": 1, "e4m3": 2, "e2m1": 3}
_HALF = GROUP // 2


@intrinsic
def _part_pairs(typingctx, source, target):  # type: ignore[no-untyped-def]
    """Bring the 32 neighbours in the 16 bytes at `source` into a record's order: 16 in low bits, the rest in high."""
    bytes_ = ir.VectorType(ir.IntType(8), _HALF)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (builder.inttoptr(address, bytes_.as_pointer()) for address in args)
        pairs, four = builder.load(source, align=1), ir.Constant(bytes_, [4] * _HALF)
        even, odd = builder.and_(pairs, ir.Constant(bytes_, [15] * _HALF)), builder.lshr(pairs, four)

        def codes(first: int) -> ir.Value:
            order = [place for i in range(first, first + _HALF // 2) for place in (i, i + _HALF)]
            return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(ir.IntType(32), _HALF), order))

        stored = builder.or_(codes(0), builder.shl(codes(_HALF // 2), four))
        builder.store(stored, target, align=1)
        return context.get_dummy_value()

    return types.void(source, target), codegen


@entry("void(int64, int64, int64, int64, int64)")
def _part_all_pairs(source, pitch, target, rows, groups):  # type: ignore[no-untyped-def]
    for row in range(rows):
        for group in range(groups):
            _part_pairs(source + pitch * row + _HALF * group, target)
            target += _HALF


@intrinsic
def _nans(typingctx, codes):  # type: ignore[no-untyped-def]
    """Which of the 64 bytes at `codes` are NaN in e4m3, a bit each."""
    bytes_ = ir.VectorType(ir.IntType(8), 64)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        loaded, nan = builder.load(builder.inttoptr(args[0], bytes_.as_pointer()), align=1), bytes_([127] * 64)
        return builder.bitcast(builder.icmp_unsigned("==", builder.and_(loaded, nan), nan), ir.IntType(64))

    return types.uint64(codes), codegen


@entry("boolean(int64, int64)")
def _has_nan(codes, count):  # type: ignore[no-untyped-def]
    found, whole = np.uint64(0), count - count % 64
    for i in range(0, whole, 64):
        found |= _nans(codes + i)
    for i in range(whole, count):
        found |= np.uint64(peek(codes + i, np.uint8(0)) & 127 == 127)
    return found != 0


@entry("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def _decode(codes, scales, points, target, rows, columns, code, kind, scale_rows, scale_columns):  # type: ignore[no-untyped-def]
    """Rows as records have them into fp32 rows of whole groups; `points` are zero points, or 0."""
    place = (codes, scales, points, target)
    if code == 0:
        _decode_rows(place, rows, columns, kind, scale_rows, scale_columns, INT8_CODE)
    elif code == 1:
        _decode_rows(place, rows, columns, kind, scale_rows, scale_columns, INT4_CODE)
    elif code == 2:
        _decode_rows(place, rows, columns, kind, scale_rows, scale_columns, E4M3_CODE)
    else:
        _decode_rows(place, rows, columns, kind, scale_rows, scale_columns, E2M1_CODE)


@helper
def _decode_rows(place, rows, columns, kind, scale_rows, scale_columns, element):  # type: ignore[no-untyped-def]
    codes, scales, points, target = place
    width = scale_columns if scale_columns else columns
    for row in range(rows):
        index = scale_index(row, scale_rows, width, columns)
        for k in range(0, columns, GROUP):
            block = index + k // width
            scale, unit = splat(scale_at(scales, block, kind)), splat(unit_of(element))
            first, second = numbers_of(codes, zero_at(points, block), element)
            store(target, mul(mul(first, unit), scale))  # a large scale times the unit might overflow
            store(target + 4 * LANES, mul(mul(second, unit), scale))
            codes, target = codes + group_bytes(element), target + 4 * GROUP


def part_pairs(pairs: torch.Tensor, target: torch.Tensor) -> None:
    """Bring codes uint8 [n, 16 g] that lie two to a byte, neighbours together, into the order of records.

    Args:
        pairs: contiguous in the last dimension.
        target: of the same shape, contiguous.
    """
    rows, nbytes = pairs.shape
    assert target.shape == pairs.shape, (target.shape, pairs.shape)
    assert target.is_contiguous(), target.stride()
    assert pairs.stride(1) == 1, pairs.stride()
    _part_all_pairs(pairs.data_ptr(), pairs.stride(0), target.data_ptr(), rows, nbytes // _HALF)


def has_nan(codes: torch.Tensor) -> bool:
    """Whether one of some e4m3 codes (uint8, of any shape) is NaN."""
    codes = codes.contiguous()
    return bool(_has_nan(codes.data_ptr(), codes.numel()))


def decode(
    coding: Coding, codes: torch.Tensor, columns: int, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """The matrix fp32 [n, columns] that codes [n, bytes] stand for, as records have them.

    Args:
        scales, zeros: [*coding.blocks((n, columns))].
    """
    rows, padded = len(codes), -(-columns // GROUP) * GROUP
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    result = torch.empty(rows, padded, dtype=torch.float32)
    _decode(
        codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), result.data_ptr(), rows, columns,
        _CODE_KINDS[coding.code], SCALE_KINDS[coding.scale], coding.rows, coding.columns,
    )  # fmt: skip
    return result[:, :columns]
