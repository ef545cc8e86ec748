"""Sum the rows of each token's pairs: y [P, H] -> out fp32 [T, H], in a fixed order, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moebius.kernels.triton.config import INTERPRETED, OPTIONS
from moebius.kernels.triton.tables import PairTable

TOKENS, COLUMNS = (128, 256) if INTERPRETED else (4, 256)


def combine(y: torch.Tensor, table: PairTable, tokens: int) -> torch.Tensor:
    """Sum over pairs.

    Args:
        y: [P, H], already weighted.
        table: the pairs.
        tokens: T.

    Returns:
        fp32 [T, H]; zero for tokens without a pair.
    """
    hidden = y.shape[1]
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=y.device)
    combine_kernel[triton.cdiv(tokens, TOKENS), triton.cdiv(hidden, COLUMNS)](
        y, table.data, out, table.pairs, tokens, H=hidden, TOKENS=TOKENS, COLUMNS=COLUMNS, **OPTIONS
    )
    return out


@triton.jit(do_not_specialize=["P", "T"])
def combine_kernel(
    y,  # [P, H]
    table,  # int32, see PairTable
    out,  # fp32 [T, H], written
    P,
    T,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS x COLUMNS sums. Grid (ceil(T / TOKENS), ceil(H / COLUMNS))."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(table + 4 * P + tokens, mask=tokens < T, other=0)
    last = tl.load(table + 4 * P + tokens + 1, mask=tokens < T, other=0)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    longest = tl.max(last - first, axis=0)
    rank = tl.zeros_like(longest)
    while rank < longest:  # not `range`: the interpreter of Triton 3.6 cannot take its bounds from memory
        present = first + rank < last
        pairs = tl.load(table + 3 * P + first + rank, mask=present, other=0).to(tl.int64)
        inside = present[:, None] & (columns < H)[None, :]
        rank += 1
        total += tl.load(y + pairs[:, None] * H + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    inside = (tokens < T)[:, None] & (columns < H)[None, :]
    tl.store(out + tokens.to(tl.int64)[:, None] * H + columns[None, :], total, mask=inside)
