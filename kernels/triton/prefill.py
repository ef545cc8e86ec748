"""Experts for many tokens: grouped GEMMs over pairs sorted by expert, weights straight from cache slots.

    a[p] = activation(x[token p] @ gate.T, x[token p] @ up.T)       [P, I] in the type of the products
    y[p] = weight p * (a[p] @ down.T + bias)                        [P, H] in the same type

Products accumulate in fp32; `combine` sums each token's rows of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.triton.activation import activate, constants
from moebius.kernels.triton.combine import combine
from moebius.kernels.triton.config import INTERPRETED, OPTIONS, PrefillTile
from moebius.kernels.triton.tables import PairTable, TileTable
from moebius.kernels.triton.weights import HALF, TYPES, depth_of, load_bias, multiply_tile, of_matrices, storage


def product_type(layout: RecordLayout, x: torch.dtype) -> torch.dtype:
    """Operands of ``tl.dot``: the type of x, to which quantised weights are unpacked, and which float weights have.

    Where float weights have another type than x, fp32 (exact, no tensor cores). The interpreter returns garbage for
    bf16 operands, so it gets fp32.
    """
    broken = INTERPRETED and x == torch.bfloat16
    return x if (layout.quantized or x == layout.dtype) and not broken else torch.float32


def prefill(
    spec: ExpertSpec,
    layout: RecordLayout,
    pool: torch.Tensor,
    x: torch.Tensor,
    table: PairTable,
    tiles: TileTable,
    tile: PrefillTile,
) -> torch.Tensor:
    """Weighted sum of the routed experts, any recognised activation.

    Args:
        pool: records, uint8 [S, nbytes].
        x: [T, H], contiguous, fp32, bf16 or fp16.
        table: the pairs, and `tiles` of them with ``tile.pairs`` rows, on the device of x.

    Returns:
        fp32 [T, H].
    """
    hidden, intermediate, products = spec.hidden, spec.intermediate, product_type(layout, x.dtype)
    activated = torch.empty(table.pairs, intermediate, dtype=products, device=x.device)
    y = torch.empty(table.pairs, hidden, dtype=products, device=x.device)
    rows, columns, depth_bytes, warps = tile
    blocks = {"PAIRS": rows, "DEPTH": depth_bytes // products.itemsize, "num_warps": warps}
    common = {**storage(layout), "TYPE": TYPES[products], **blocks, **OPTIONS}
    half = columns // 2 if spec.gated else columns
    gate_up_kernel[tiles.tiles, triton.cdiv(intermediate, half)](
        pool, x, table.data, tiles.data, activated, table.pairs, tiles.tiles,
        **of_matrices(layout, "gate", "up"), GATED=spec.gated, **constants(spec.activation), **common, COLUMNS=half,
    )  # fmt: skip
    down_kernel[tiles.tiles, triton.cdiv(hidden, columns)](
        pool, activated, table.data, tiles.data, y, table.pairs, tiles.tiles,
        **of_matrices(layout, "down"), **common, COLUMNS=columns,
    )  # fmt: skip
    return combine(y, table, x.shape[0])


@triton.jit(do_not_specialize=["P", "M"])
def gate_up_kernel(
    pool,  # uint8 [S, STRIDE]
    x,  # [T, H]
    table,  # int32, see PairTable
    tiles,  # int32, see TileTable
    activated,  # [P, I], written
    P,
    M,
    UP: tl.constexpr, UP_SCALE: tl.constexpr, UP_ZERO: tl.constexpr, UP_BIAS: tl.constexpr,
    GATE: tl.constexpr, GATE_SCALE: tl.constexpr, GATE_ZERO: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, ACT_MAX: tl.constexpr,
    UP_MAX: tl.constexpr, UP_SHIFT: tl.constexpr,
    TYPE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Activated intermediate of one tile of pairs, COLUMNS of I. Grid (M, ceil(I / COLUMNS))."""
    tile = tl.program_id(0)
    record = pool + tl.load(tiles + tile).to(tl.int64) * STRIDE
    pairs = tl.load(tiles + M + tile) + tl.arange(0, PAIRS)
    live = pairs < tl.load(tiles + 2 * M + tile)
    inputs = x + tl.load(table + P + pairs, mask=live, other=0).to(tl.int64)[:, None] * H
    rows = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # of the weights
    up = tl.zeros([PAIRS, COLUMNS], tl.float32)
    gate = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(0, H, DEPTH):
        first, second = _operands(inputs, live, start, H, CODING, TYPE, DEPTH)
        up = multiply_tile(up, first, second, record, UP, UP_SCALE, UP_ZERO, CODING, rows, INNER, H, start, TYPE, DEPTH)
        if GATED:
            gate = multiply_tile(
                gate, first, second, record, GATE, GATE_SCALE, GATE_ZERO, CODING, rows, INNER, H, start, TYPE, DEPTH
            )
    if BIASED:
        up += load_bias(record, UP_BIAS, BIAS, rows, INNER)[None, :]
        if GATED:
            gate += load_bias(record, GATE_BIAS, BIAS, rows, INNER)[None, :]
    leading = gate if GATED else up
    result = activate(leading, up, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT)
    target = activated + pairs.to(tl.int64)[:, None] * INNER + rows[None, :]
    tl.store(target, result.to(TYPE), mask=live[:, None] & (rows < INNER)[None, :])


@triton.jit(do_not_specialize=["P", "M"])
def down_kernel(
    pool,  # uint8 [S, STRIDE]
    activated,  # [P, I]
    table,  # int32, see PairTable
    tiles,  # int32, see TileTable
    y,  # [P, H], written
    P,
    M,
    DOWN: tl.constexpr, DOWN_SCALE: tl.constexpr, DOWN_ZERO: tl.constexpr, DOWN_BIAS: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    TYPE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weighted outputs of one tile of pairs, COLUMNS of H. Grid (M, ceil(H / COLUMNS))."""
    tile = tl.program_id(0)
    record = pool + tl.load(tiles + tile).to(tl.int64) * STRIDE
    pairs = tl.load(tiles + M + tile) + tl.arange(0, PAIRS)
    live = pairs < tl.load(tiles + 2 * M + tile)
    inputs = activated + pairs.to(tl.int64)[:, None] * INNER
    rows = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # of the weights
    total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        first, second = _operands(inputs, live, start, INNER, CODING, TYPE, DEPTH)
        total = multiply_tile(
            total, first, second, record, DOWN, DOWN_SCALE, DOWN_ZERO, CODING, rows, H, INNER, start, TYPE, DEPTH
        )
    if BIASED:
        total += load_bias(record, DOWN_BIAS, BIAS, rows, H)[None, :]
    scale = tl.load(table + 2 * P + pairs, mask=live, other=0).to(tl.float32, bitcast=True)
    present = live[:, None] & (rows < H)[None, :]
    tl.store(y + pairs.to(tl.int64)[:, None] * H + rows[None, :], (total * scale[:, None]).to(TYPE), mask=present)


@triton.jit
def _operands(inputs, live, start, M: tl.constexpr, CODING: tl.constexpr, TYPE: tl.constexpr, DEPTH: tl.constexpr):
    """Both halves of one step's inputs, TYPE [PAIRS, columns of `depth_of`]."""
    depth = depth_of(start, CODING, DEPTH)[None, :]
    first = tl.load(inputs + depth, mask=live[:, None] & (depth < M), other=0.0).to(TYPE)
    second = first
    if CODING[0] == 4:
        second = tl.load(inputs + depth + HALF, mask=live[:, None] & (depth + HALF < M), other=0.0).to(TYPE)
    return first, second
