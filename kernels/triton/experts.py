"""The experts of one layer step on an accelerator: the kernel that suits the number of tokens."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import Routes
from moebius.kernels.triton.choice import tile_for
from moebius.kernels.triton.config import FP32_TILE, INTERPRETED, DecodeTile, PrefillTile
from moebius.kernels.triton.decode import decode
from moebius.kernels.triton.prefill import prefill, product_type
from moebius.kernels.triton.tables import Send, pair_table, sender, tile_table

# The interpreter keeps the running program's index in a global.
_one_at_a_time: AbstractContextManager[object] = threading.Lock() if INTERPRETED else nullcontext()


def moe_forward(
    spec: ExpertSpec,
    layout: RecordLayout,
    pool: torch.Tensor,
    x: torch.Tensor,
    routes: Routes,
    slots: np.ndarray,
    send: Send | None = None,
) -> torch.Tensor:
    """Weighted sum of the routed experts, like `kernels.reference.moe_forward`.

    Args:
        pool: records on the device, uint8 [S, layout.nbytes].
        x: [T, H] on the device, fp32, bf16 or fp16.
        routes: A experts and their pairs.
        slots: int32 [A], where each expert's record is; -1 for experts that are left out.
        send: brings index tables to the device, else they are copied there while the host waits.

    Returns:
        fp32 [T, H] on the device.
    """
    tokens, x, send = x.shape[0], x.contiguous(), send or sender(x.device)
    pairs = pair_table(routes, slots, tokens, send)
    if not pairs.pairs:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    tile = tile_for(spec, layout, tokens, x.device)
    if isinstance(tile, PrefillTile) and product_type(layout, x.dtype) == torch.float32:
        tile = FP32_TILE
    with _one_at_a_time:
        if isinstance(tile, DecodeTile):
            return decode(spec, layout, pool, x, pairs, tile)
        return prefill(spec, layout, pool, x, pairs, tile_table(routes, slots, tile.pairs, send), tile)
