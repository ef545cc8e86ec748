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
from moebius.kernels.triton.config import INTERPRETED, OPTIONS
from moebius.kernels.triton.tables import PairTable, part_offsets

# Rows x columns of a weight tile: 8 KiB of bf16 per program and step. Not yet tuned on a device. The interpreter costs
# about 15 ms per program whatever its size, so tiles are large there.
ROWS, COLUMNS = (256, 256) if INTERPRETED else (16, 256)


def decode(
    spec: ExpertSpec, layout: RecordLayout, pool: torch.Tensor, x: torch.Tensor, table: PairTable
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
    records = pool.view(layout.dtype)
    activated = torch.empty(table.pairs, intermediate, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    shape = {"H": hidden, "INNER": intermediate, "STRIDE": records.shape[1], "BIASED": spec.biased} | OPTIONS
    parts = part_offsets(layout)
    intermediate_kernel[table.pairs, triton.cdiv(intermediate, ROWS)](
        records, x, table.data, activated, table.pairs,
        UP=parts["up"], GATE=parts["gate"], UP_BIAS=parts["up_bias"], GATE_BIAS=parts["gate_bias"],
        GATED=spec.gated, **shape, **constants(spec.activation), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    down_kernel[tokens, triton.cdiv(hidden, ROWS)](
        records, activated, table.data, out, table.pairs,
        DOWN=parts["down"], DOWN_BIAS=parts["down_bias"], **shape, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["P"])
def intermediate_kernel(
    records,  # [S, STRIDE]
    x,  # [T, H]
    table,  # int32, see PairTable
    activated,  # fp32 [P, I], written
    P,
    UP: tl.constexpr, GATE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, ACT_MAX: tl.constexpr,
    UP_MAX: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gate, up and activation of ROWS rows for one pair. Grid (P, ceil(I / ROWS))."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    record = records + tl.load(table + pair).to(tl.int64) * STRIDE
    inputs = x + tl.load(table + P + pair).to(tl.int64) * H
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, H, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < INNER)[:, None] & (columns < H)[None, :]
        tile = rows[:, None] * H + columns[None, :]
        value = tl.load(inputs + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
        up += tl.load(record + UP + tile, mask=inside, other=0.0).to(tl.float32) * value
        if GATED:
            gate += tl.load(record + GATE + tile, mask=inside, other=0.0).to(tl.float32) * value
    up_sum = tl.sum(up, axis=1)
    gate_sum = tl.sum(gate, axis=1)
    if BIASED:
        up_sum += tl.load(record + UP_BIAS + rows, mask=rows < INNER, other=0.0).to(tl.float32)
        if GATED:
            gate_sum += tl.load(record + GATE_BIAS + rows, mask=rows < INNER, other=0.0).to(tl.float32)
    first = gate_sum if GATED else up_sum
    result = activate(first, up_sum, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT)
    tl.store(activated + pair.to(tl.int64) * INNER + rows, result, mask=rows < INNER)


@triton.jit(do_not_specialize=["P"])
def down_kernel(
    records,  # [S, STRIDE]
    activated,  # fp32 [P, I]
    table,  # int32, see PairTable
    out,  # fp32 [T, H], written
    P,
    DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token over all its pairs. Grid (T, ceil(H / ROWS))."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for position in range(tl.load(table + 4 * P + token), tl.load(table + 4 * P + token + 1)):
        pair = tl.load(table + 3 * P + position)
        record = records + tl.load(table + pair).to(tl.int64) * STRIDE
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, INNER, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows < H)[:, None] & (columns < INNER)[None, :]
            value = tl.load(activated + pair.to(tl.int64) * INNER + columns, mask=columns < INNER, other=0.0)[None, :]
            tile = rows[:, None] * INNER + columns[None, :]
            products += tl.load(record + DOWN + tile, mask=inside, other=0.0).to(tl.float32) * value
        y = tl.sum(products, axis=1)
        if BIASED:
            y += tl.load(record + DOWN_BIAS + rows, mask=rows < H, other=0.0).to(tl.float32)
        total += tl.load(table + 2 * P + pair).to(tl.float32, bitcast=True) * y
    tl.store(out + token.to(tl.int64) * H + rows, total, mask=rows < H)
