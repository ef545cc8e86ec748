"""Index tables of a launch, built on the host and moved to the device in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moebius.kernels.routes import Routes


class PairTable(NamedTuple):
    """Pairs sorted by expert, as one int32 array ``[slot P | token P | weight P (fp32 bits) | order P | start T + 1]``.

    Token t has the pairs ``order[start[t]:start[t + 1]]``. One array, because Triton compiles a kernel anew for each
    combination of pointer alignments.
    """

    data: torch.Tensor  # int32 [4 P + T + 1]
    pairs: int


class TileTable(NamedTuple):
    """Runs of at most `rows` pairs of one expert, ``[slot M | first pair M | past the last pair M]``."""

    data: torch.Tensor  # int32 [3 M]
    tiles: int


def pair_table(routes: Routes, slots: np.ndarray, tokens: int, device: torch.device) -> PairTable:
    """The table for `routes` over T = `tokens` tokens; expert ``routes.experts[i]`` is in slot ``slots[i]``."""
    start = np.zeros(tokens + 1, np.int32)
    np.cumsum(np.bincount(routes.tokens, minlength=tokens), out=start[1:])
    parts = (
        np.repeat(slots.astype(np.int32), routes.counts),
        routes.tokens,
        routes.weights.view(np.int32),
        np.argsort(routes.tokens, kind="stable").astype(np.int32),
        start,
    )
    return PairTable(_to_device(np.concatenate(parts), device), len(routes.tokens))


def tile_table(routes: Routes, slots: np.ndarray, rows: int, device: torch.device) -> TileTable:
    """Cut each expert's pairs into tiles of `rows`."""
    tiles = -(-routes.counts // rows)
    owner = np.repeat(np.arange(len(tiles)), tiles)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = routes.offsets[owner] + within * rows
    last = np.minimum(first + rows, routes.offsets[owner + 1])
    return TileTable(_to_device(np.concatenate([slots[owner], first, last]).astype(np.int32), device), len(owner))


def _to_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(table)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
