"""Index tables of a launch, built on the host, each sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from moebius.kernels.numba.routing import list_pairs, list_tiles
from moebius.kernels.routes import Routes

# a table, int32 [n] -> the same on the device
Send = Callable[[np.ndarray], torch.Tensor]


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


def pair_table(routes: Routes, slots: np.ndarray, tokens: int, send: Send) -> PairTable:
    """The table for `routes` over T = `tokens` tokens.

    Args:
        slots: of each expert, int32 [A]; -1 for those whose pairs are left out.
    """
    table = list_pairs(routes.offsets, routes.tokens, routes.weights, slots, tokens)
    return PairTable(send(table), (len(table) - tokens - 1) // 4)


def tile_table(routes: Routes, slots: np.ndarray, rows: int, send: Send) -> TileTable:
    """Cut each expert's pairs, as they stand in the `pair_table`, into tiles of `rows`."""
    tiles = list_tiles(routes.offsets, slots, rows)
    return TileTable(send(tiles.reshape(-1)), tiles.shape[1])


def sender(device: torch.device) -> Send:
    """Sends tables to a device while the host waits."""
    return lambda table: torch.from_numpy(table).to(device)
