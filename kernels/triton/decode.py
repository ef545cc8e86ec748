"""Experts for a few tokens, straight from cache slots: two launches, no copy of weights, no atomics.

    a[p]   = activation(gate[slot p] @ x[token p], up[slot p] @ x[token p])        [P, I], see `product_type`
    out[t] = sum over pairs p of token t: weight p * (down[slot p] @ a[p] + bias)  fp32 [T, H]

Both read each weight once per pair; the experts of one layer step share nothing at batch 1. A token's pairs are summed
in a fixed order within one program, so the result does not vary from run to run.

A thread loads a unit of 16 bytes of each of its rows, of gate and of up, before it multiplies any, and nothing passes
between threads but the last sums. `down_kernel` starts while the other still runs, where the device can
(`ptx.early_launch`), and asks for its weights before it waits for its inputs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.triton.activation import activate, constants
from moebius.kernels.triton.config import INTERPRETED, OPTIONS, DecodeTile
from moebius.kernels.triton.prefill import product_type
from moebius.kernels.triton.ptx import early_launch, let_next_start, wait
from moebius.kernels.triton.tables import PairTable
from moebius.kernels.triton.weights import (
    load_bias,
    load_inputs,
    load_units,
    multiply_units,
    of_matrices,
    part,
    storage,
    units_of,
)

# Rows in one tile. Layouts of weights and of their inputs agree where both have one; Triton would exchange inputs
# between threads otherwise. The interpreter needs few operations instead.
BLOCK = 128 if INTERPRETED else 1


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
    activated = torch.empty(table.pairs, intermediate, dtype=product_type(layout, x.dtype), device=x.device)
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    common = {**storage(layout), "BLOCK": BLOCK, **early_launch(x.device), **OPTIONS}
    intermediate_kernel[table.pairs, triton.cdiv(intermediate, tile.rows * BLOCK)](
        pool, x, table.data, activated, table.pairs,
        **of_matrices(layout, "gate", "up"), GATED=spec.gated, **constants(spec.activation), **common,
        ROWS=tile.rows, UNITS=_units(layout, hidden, tile.units), num_warps=tile.warps,
    )  # fmt: skip
    down_kernel[tokens, triton.cdiv(hidden, tile.down_rows * BLOCK)](
        pool, activated, table.data, out, table.pairs, **of_matrices(layout, "down"), **common,
        ROWS=tile.down_rows, PAIRS=tile.down_pairs,
        UNITS=_units(layout, intermediate, tile.down_units), num_warps=tile.down_warps,
    )  # fmt: skip
    return out


@cache
def _units(layout: RecordLayout, columns: int, most: int) -> int:
    return min(most, triton.next_power_of_2(units_of(layout, columns)))


@triton.jit(do_not_specialize=["P"])
def intermediate_kernel(
    pool,  # uint8 [S, STRIDE]
    x,  # [T, H]
    table,  # int32, see PairTable
    activated,  # [P, I], written
    P,
    UP: tl.constexpr, UP_SCALE: tl.constexpr, UP_ZERO: tl.constexpr, UP_BIAS: tl.constexpr,
    GATE: tl.constexpr, GATE_SCALE: tl.constexpr, GATE_ZERO: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, ACT_MAX: tl.constexpr,
    UP_MAX: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Gate, up and activation for one pair. Grid (P, ceil(I / (ROWS BLOCK)))."""
    wait()
    let_next_start()
    pair = tl.program_id(0)
    place = tl.arange(0, ROWS)[None, None, None, :]
    rows = (tl.program_id(1) * (ROWS * BLOCK) + tl.arange(0, BLOCK))[None, :, None, None]
    record = pool + tl.load(table + pair).to(tl.int64) * STRIDE
    inputs = x + tl.load(table + P + pair).to(tl.int64) * H
    up_sums = tl.zeros([1, BLOCK, UNITS, ROWS], tl.float32)
    gate_sums = tl.zeros([1, BLOCK, UNITS, ROWS], tl.float32)
    for start in range(0, (H + CODING[7] - 1) // CODING[7], UNITS):
        unit = (start + tl.arange(0, UNITS))[None, None, :, None]
        ups = ()
        gates = ()
        for r in tl.static_range(ROWS):
            stored = load_units(record, rows, r * BLOCK, unit, True, UP, INNER, H, CODING, ROWS * BLOCK, UNITS)
            ups += (stored,)  # type: ignore[assignment]
            if GATED:
                stored = load_units(record, rows, r * BLOCK, unit, True, GATE, INNER, H, CODING, ROWS * BLOCK, UNITS)
                gates += (stored,)  # type: ignore[assignment]
        first, second, sums = load_inputs(inputs, unit, True, H, CODING)
        for r in tl.static_range(ROWS):
            products = multiply_units(
                ups[r], first, second, sums, record, rows + r * BLOCK, unit, True, UP_SCALE, UP_ZERO, INNER, H, CODING
            )
            up_sums = tl.where(place == r, up_sums + products, up_sums)
            if GATED:
                products = multiply_units(
                    gates[r], first, second, sums, record, rows + r * BLOCK, unit, True,
                    GATE_SCALE, GATE_ZERO, INNER, H, CODING,
                )  # fmt: skip
                gate_sums = tl.where(place == r, gate_sums + products, gate_sums)
    all_rows = _rows(ROWS, BLOCK)
    up = tl.sum(tl.sum(up_sums, axis=2), axis=0)
    gate = tl.sum(tl.sum(gate_sums, axis=2), axis=0)
    if BIASED:
        up += load_bias(record, UP_BIAS, BIAS, all_rows, INNER)
        if GATED:
            gate += load_bias(record, GATE_BIAS, BIAS, all_rows, INNER)
    leading = gate if GATED else up
    result = activate(leading, up, GATED, KIND, ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT)
    tl.store(activated + pair.to(tl.int64) * INNER + all_rows, result, mask=all_rows < INNER)


@triton.jit(do_not_specialize=["P"])
def down_kernel(
    pool,  # uint8 [S, STRIDE]
    activated,  # [P, I]
    table,  # int32, see PairTable
    out,  # fp32 [T, H], written
    P,
    DOWN: tl.constexpr, DOWN_SCALE: tl.constexpr, DOWN_ZERO: tl.constexpr, DOWN_BIAS: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CODING: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Outputs of one token over all its pairs, PAIRS at once. Grid (T, ceil(H / (ROWS BLOCK)))."""
    token = tl.program_id(0)
    place = tl.arange(0, ROWS)[None, None, None, :]
    rows = (tl.program_id(1) * (ROWS * BLOCK) + tl.arange(0, BLOCK))[None, :, None, None]
    all_rows = _rows(ROWS, BLOCK)
    total = tl.zeros([PAIRS, BLOCK, UNITS, ROWS], tl.float32)
    biases = tl.zeros([BLOCK, ROWS], tl.float32)
    position = tl.load(table + 4 * P + token)
    end = tl.load(table + 4 * P + token + 1)
    while position < end:  # not `range`: the interpreter of Triton 3.6 cannot take its bounds from memory
        ranks = (position + tl.arange(0, PAIRS))[:, None, None, None]
        live = ranks < end
        pairs = tl.load(table + 3 * P + ranks, mask=live, other=0)
        record = pool + tl.load(table + pairs, mask=live, other=0).to(tl.int64) * STRIDE
        weights = tl.load(table + 2 * P + pairs, mask=live, other=0).to(tl.float32, bitcast=True)
        inputs = activated + pairs.to(tl.int64) * INNER
        position += PAIRS
        for start in range(0, (INNER + CODING[7] - 1) // CODING[7], UNITS):
            unit = (start + tl.arange(0, UNITS))[None, None, :, None]
            downs = ()
            for r in tl.static_range(ROWS):
                stored = load_units(record, rows, r * BLOCK, unit, live, DOWN, H, INNER, CODING, ROWS * BLOCK, UNITS)
                downs += (stored,)  # type: ignore[assignment]
            wait()  # weights are there already; the inputs are what the kernel before this one writes
            first, second, sums = load_inputs(inputs, unit, live, INNER, CODING)
            for r in tl.static_range(ROWS):
                products = multiply_units(
                    downs[r], first, second, sums, record, rows + r * BLOCK, unit, live,
                    DOWN_SCALE, DOWN_ZERO, H, INNER, CODING,
                )  # fmt: skip
                total = tl.where(place == r, total + products * weights, total)
        if BIASED:
            bias = tl.load(
                part(record, DOWN_BIAS, BIAS) + all_rows[None, :, None, :],
                mask=live & (all_rows < H)[None, :, None, :], other=0.0,
            )  # fmt: skip
            biases += tl.sum(tl.sum(bias.to(tl.float32) * weights, axis=2), axis=0)
    result = tl.sum(tl.sum(total, axis=2), axis=0) + biases
    tl.store(out + token.to(tl.int64) * H + all_rows, result, mask=all_rows < H)


@triton.jit
def _rows(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of a program's rows, [BLOCK, ROWS]."""
    first = tl.program_id(1) * (ROWS * BLOCK)
    return first + tl.arange(0, BLOCK)[:, None] + tl.arange(0, ROWS)[None, :] * BLOCK
