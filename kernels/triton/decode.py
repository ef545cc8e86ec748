"""Experts for a few tokens, straight from cache slots: two launches, no copy of weights, no atomics.

    a[p]   = activation(gate[slot p] @ x[token p], up[slot p] @ x[token p])        fp32 [P, I]
    out[t] = sum over pairs p of token t: weight p * (down[slot p] @ a[p] + bias)  fp32 [T, H]

Both read each weight once per pair; the experts of one layer step share nothing at batch 1. A token's pairs are summed
in a fixed order within one program, so the result does not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.triton.activation import activate, constants
from moebius.kernels.triton.config import OPTIONS, DecodeTile
from moebius.kernels.triton.tables import PairTable
from moebius.kernels.triton.weights import GROUP_SIZE, load_bias, load_inputs, multiply_rows, of_matrices, storage


def decode(
    spec: ExpertSpec, layout: RecordLayout, pool: torch.Tensor, x: torch.Tensor, table: PairTable, tile: DecodeTile
) -> torch.Tensor:
    """Weighted sum of the routed experts, any recognised activation.

    Args:
        pool: records, uint8 [S, nbytes].
        x: [T, H], contiguous, fp32, bf16 or fp16.
        table: the pairs, on the device of x.

    Returns:
        fp32 [T, H].
    """
    tokens, hidden, intermediate = x.shape[0], spec.hidden, spec.intermediate
    activated = torch.empty(table.pairs, intermediate, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    common = {**storage(layout), "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, **OPTIONS}
    intermediate_kernel[table.pairs, triton.cdiv(intermediate, tile.rows)](
        pool, x, table.data, activated, table.pairs,
        **of_matrices(layout, "gate", "up"), GATED=spec.gated, **constants(spec.activation), **common,
    )  # fmt: skip
    down_kernel[tokens, triton.cdiv(hidden, tile.rows)](
        pool, activated, table.data, out, table.pairs, **of_matrices(layout, "down"), **common
    )
    return out


@triton.jit(do_not_specialize=["P"])
def intermediate_kernel(
    pool,  # uint8 [S, STRIDE]
    x,  # [T, H]
    table,  # int32, see PairTable
    activated,  # fp32 [P, I], written
    P,
    UP: tl.constexpr, UP_SCALE: tl.constexpr, UP_ZERO: tl.constexpr, UP_BIAS: tl.constexpr,
    GATE: tl.constexpr, GATE_SCALE: tl.constexpr, GATE_ZERO: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, ACT_MAX: tl.constexpr,
    UP_MAX: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gate, up and activation of ROWS rows for one pair. Grid (P, ceil(I / ROWS))."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    record = pool + tl.load(table + pair).to(tl.int64) * STRIDE
    inputs = x + tl.load(table + P + pair).to(tl.int64) * H
    SUMS: tl.constexpr = COLUMNS if CODING[0] == 0 else COLUMNS // GROUP_SIZE
    up = tl.zeros([ROWS, SUMS], tl.float32)
    gate = tl.zeros([ROWS, SUMS], tl.float32)
    for start in range(0, H, COLUMNS):
        first, second = load_inputs(inputs, start, H, CODING, COLUMNS)
        up += multiply_rows(record, UP, UP_SCALE, UP_ZERO, CODING, rows, INNER, H, start, first, second, COLUMNS)
        if GATED:
            gate += multiply_rows(
                record, GATE, GATE_SCALE, GATE_ZERO, CODING, rows, INNER, H, start, first, second, COLUMNS
            )
    up_sum = tl.sum(up, axis=1)
    gate_sum = tl.sum(gate, axis=1)
    if BIASED:
        up_sum += load_bias(record, UP_BIAS, BIAS, rows, INNER)
        if GATED:
            gate_sum += load_bias(record, GATE_BIAS, BIAS, rows, INNER)
    leading = gate_sum if GATED else up_sum
    result = activate(leading, up_sum, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT)
    tl.store(activated + pair.to(tl.int64) * INNER + rows, result, mask=rows < INNER)


@triton.jit(do_not_specialize=["P"])
def down_kernel(
    pool,  # uint8 [S, STRIDE]
    activated,  # fp32 [P, I]
    table,  # int32, see PairTable
    out,  # fp32 [T, H], written
    P,
    DOWN: tl.constexpr, DOWN_SCALE: tl.constexpr, DOWN_ZERO: tl.constexpr, DOWN_BIAS: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token over all its pairs. Grid (T, ceil(H / ROWS))."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    SUMS: tl.constexpr = COLUMNS if CODING[0] == 0 else COLUMNS // GROUP_SIZE
    total = tl.zeros([ROWS], tl.float32)
    position = tl.load(table + 4 * P + token)
    end = tl.load(table + 4 * P + token + 1)
    while position < end:  # not `range`: the interpreter of Triton 3.6 cannot take its bounds from memory
        pair = tl.load(table + 3 * P + position)
        position += 1
        record = pool + tl.load(table + pair).to(tl.int64) * STRIDE
        inputs = activated + pair.to(tl.int64) * INNER
        products = tl.zeros([ROWS, SUMS], tl.float32)
        for start in range(0, INNER, COLUMNS):
            first, second = load_inputs(inputs, start, INNER, CODING, COLUMNS)
            products += multiply_rows(
                record, DOWN, DOWN_SCALE, DOWN_ZERO, CODING, rows, H, INNER, start, first, second, COLUMNS
            )
        y = tl.sum(products, axis=1)
        if BIASED:
            y += load_bias(record, DOWN_BIAS, BIAS, rows, H)
        total += tl.load(table + 2 * P + pair).to(tl.float32, bitcast=True) * y
    tl.store(out + token.to(tl.int64) * H + rows, total, mask=rows < H)
