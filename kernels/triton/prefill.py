"""Experts for many tokens: grouped GEMMs over pairs sorted by expert, weights straight from cache slots.

    a[p] = activation(x[token p] @ gate.T, x[token p] @ up.T)       [P, I] in the type of the products
    y[p] = weight p * (a[p] @ down.T + bias)                        fp32 [P, H]

Products accumulate in fp32; `combine` sums each token's rows of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.triton.activation import activate, constants
from moebius.kernels.triton.combine import combine
from moebius.kernels.triton.config import INTERPRETED, OPTIONS
from moebius.kernels.triton.tables import PairTable, TileTable, part_offsets

# Pairs, columns of the product, and bytes of depth per step (a cache line). Not yet tuned on a device. The interpreter
# costs about 15 ms per program whatever its size, so tiles are large there.
PAIRS, COLUMNS, DEPTH_BYTES = (128, 256, 1024) if INTERPRETED else (64, 64, 128)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_type(records: torch.dtype, x: torch.dtype) -> torch.dtype:
    """Operands of ``tl.dot``: the common type, or fp32 (exact, no tensor cores) where the two differ.

    The interpreter returns garbage for bf16 operands, so it gets fp32.
    """
    broken = INTERPRETED and x == torch.bfloat16
    return x if x == records and not broken else torch.float32


def prefill(
    spec: ExpertSpec, layout: RecordLayout, pool: torch.Tensor, x: torch.Tensor, table: PairTable, tiles: TileTable
) -> torch.Tensor:
    """Weighted sum of the routed experts, any recognised activation.

    Args:
        pool: records, uint8 [S, nbytes].
        x: [T, H], contiguous, fp32, bf16 or fp16.
        table: the pairs, and `tiles` of them with `PAIRS` rows, on the device of x.

    Returns:
        fp32 [T, H].
    """
    hidden, intermediate, records = spec.hidden, spec.intermediate, pool.view(layout.dtype)
    products = product_type(layout.dtype, x.dtype)
    activated = torch.empty(table.pairs, intermediate, dtype=products, device=x.device)
    y = torch.empty(table.pairs, hidden, dtype=torch.float32, device=x.device)
    shape = {"H": hidden, "INNER": intermediate, "STRIDE": records.shape[1], "BIASED": spec.biased} | OPTIONS
    blocks = {"TYPE": TYPES[products], "PAIRS": PAIRS, "COLUMNS": COLUMNS, "DEPTH": DEPTH_BYTES // products.itemsize}
    parts = part_offsets(layout)
    gate_up_kernel[tiles.tiles, triton.cdiv(intermediate, COLUMNS)](
        records, x, table.data, tiles.data, activated, table.pairs, tiles.tiles,
        UP=parts["up"], GATE=parts["gate"], UP_BIAS=parts["up_bias"], GATE_BIAS=parts["gate_bias"],
        GATED=spec.gated, **shape, **constants(spec.activation), **blocks,
    )  # fmt: skip
    down_kernel[tiles.tiles, triton.cdiv(hidden, COLUMNS)](
        records, activated, table.data, tiles.data, y, table.pairs, tiles.tiles,
        DOWN=parts["down"], DOWN_BIAS=parts["down_bias"], **shape, **blocks,
    )  # fmt: skip
    return combine(y, table, x.shape[0])


@triton.jit(do_not_specialize=["P", "M"])
def gate_up_kernel(
    records,  # [S, STRIDE]
    x,  # [T, H]
    table,  # int32, see PairTable
    tiles,  # int32, see TileTable
    activated,  # [P, I], written
    P,
    M,
    UP: tl.constexpr, GATE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, ACT_MAX: tl.constexpr,
    UP_MAX: tl.constexpr, UP_SHIFT: tl.constexpr,
    TYPE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Activated intermediate of one tile of pairs, COLUMNS of I. Grid (M, ceil(I / COLUMNS))."""
    tile = tl.program_id(0)
    record = records + tl.load(tiles + tile).to(tl.int64) * STRIDE
    pairs = tl.load(tiles + M + tile) + tl.arange(0, PAIRS)
    live = pairs < tl.load(tiles + 2 * M + tile)
    inputs = tl.load(table + P + pairs, mask=live, other=0).to(tl.int64) * H
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    up = tl.zeros([PAIRS, COLUMNS], tl.float32)
    gate = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(0, H, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        operand = tl.load(x + inputs[:, None] + depth[None, :], mask=live[:, None] & (depth < H)[None, :], other=0.0)
        operand = operand.to(TYPE)
        weights = columns[None, :] * H + depth[:, None]  # row-major [I, H], read transposed
        inside = (columns < INNER)[None, :] & (depth < H)[:, None]
        tile_up = tl.load(record + UP + weights, mask=inside, other=0.0).to(TYPE)
        up = tl.dot(operand, tile_up, up, input_precision="ieee")
        if GATED:
            tile_gate = tl.load(record + GATE + weights, mask=inside, other=0.0).to(TYPE)
            gate = tl.dot(operand, tile_gate, gate, input_precision="ieee")
    if BIASED:
        up += tl.load(record + UP_BIAS + columns, mask=columns < INNER, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(record + GATE_BIAS + columns, mask=columns < INNER, other=0.0).to(tl.float32)[None, :]
    first = gate if GATED else up
    result = activate(first, up, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT)
    target = activated + pairs.to(tl.int64)[:, None] * INNER + columns[None, :]
    tl.store(target, result.to(TYPE), mask=live[:, None] & (columns < INNER)[None, :])


@triton.jit(do_not_specialize=["P", "M"])
def down_kernel(
    records,  # [S, STRIDE]
    activated,  # [P, I]
    table,  # int32, see PairTable
    tiles,  # int32, see TileTable
    y,  # fp32 [P, H], written
    P,
    M,
    DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    TYPE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weighted outputs of one tile of pairs, COLUMNS of H. Grid (M, ceil(H / COLUMNS))."""
    tile = tl.program_id(0)
    record = records + tl.load(tiles + tile).to(tl.int64) * STRIDE
    pairs = tl.load(tiles + M + tile) + tl.arange(0, PAIRS)
    live = pairs < tl.load(tiles + 2 * M + tile)
    rows = pairs.to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        present = live[:, None] & (depth < INNER)[None, :]
        operand = tl.load(activated + rows * INNER + depth[None, :], mask=present, other=0.0)
        weights = columns[None, :] * INNER + depth[:, None]  # row-major [H, I], read transposed
        inside = (columns < H)[None, :] & (depth < INNER)[:, None]
        total = tl.dot(
            operand, tl.load(record + DOWN + weights, mask=inside, other=0.0).to(TYPE), total, input_precision="ieee"
        )
    if BIASED:
        total += tl.load(record + DOWN_BIAS + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(table + 2 * P + pairs, mask=live, other=0).to(tl.float32, bitcast=True)
    present = live[:, None] & (columns < H)[None, :]
    tl.store(y + rows * H + columns[None, :], total * scale[:, None], mask=present)
