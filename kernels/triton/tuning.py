"""Find the fastest tiles of a layer on a device. Takes a minute or so: never done while a model runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.runtime.errors import OutOfResources

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import build_routes
from moebius.kernels.triton.choice import Kind, Tile, keep, known
from moebius.kernels.triton.config import TOKEN_CLASSES, DecodeTile, candidates
from moebius.kernels.triton.decode import decode
from moebius.kernels.triton.prefill import prefill
from moebius.kernels.triton.tables import pair_table, sender, tile_table

logger = logging.getLogger(__name__)

Timer = Callable[[Tile], float]  # microseconds of one call with that tile
_EXPERTS, _TOP_K = 16, 8
_TOKENS = {"decode": 1, "batch": 32, "prompt": 512}  # 1, 16 and 256 pairs of each active expert


class Timed(NamedTuple):
    """A tile and the microseconds of a call with it."""

    tile: Tile
    us: float


def measure(kind: Kind, timer: Timer) -> list[Timed]:
    """Time all candidates, the fastest first; those that need more of the device than it has are left out.

    Raises:
        RuntimeError: that is all of them.
    """
    found = []
    for tile in candidates(kind.code, kind.tokens):
        try:
            found.append(Timed(tile, timer(tile)))
        except OutOfResources as error:
            logger.info("%s is too large for %s: %s", tile, kind.device, error)
    if not found:
        raise RuntimeError(f"no tile for {kind.label} fits {kind.device}; report this, with the device's name")
    return sorted(found, key=lambda timed: timed.us)


def tune(
    spec: ExpertSpec, layout: RecordLayout, device: str, timer_for: Callable[[str], Timer]
) -> Iterator[tuple[Kind, list[Timed]]]:
    """Keep the fastest tile for each class of tokens that none is kept for yet.

    Args:
        device: name of the device.
        timer_for: makes the timer of a class of tokens, as `device_timer` does.

    Yields:
        What was timed, and the times, the fastest first; nothing for what was known.
    """
    for tokens in TOKEN_CLASSES:
        kind = Kind.of(device, spec, layout, tokens)
        if known(kind) is None:
            found = measure(kind, timer_for(tokens))
            keep(kind, found[0].tile)
            yield kind, found


def device_timer(spec: ExpertSpec, layout: RecordLayout, device: torch.device) -> Callable[[str], Timer]:
    """Timers of the real kernels, with cold caches, on records that mean nothing."""

    def timer_for(tokens: str) -> Timer:
        pool = torch.randint(64, (_EXPERTS, layout.nbytes), dtype=torch.uint8, device=device)  # no NaN in any format
        count = _TOKENS[tokens]
        ids = (np.arange(count)[:, None] + np.arange(_TOP_K)) % _EXPERTS
        routes = build_routes(ids, np.full(ids.shape, 1 / _TOP_K, np.float32), _EXPERTS)
        slots = routes.experts.astype(np.int32)
        dtype = torch.bfloat16 if layout.quantized else layout.dtype
        x, send = torch.ones(count, spec.hidden, dtype=dtype, device=device), sender(device)
        pairs = pair_table(routes, slots, count, send)

        def timer(tile: Tile) -> float:
            if isinstance(tile, DecodeTile):
                return _microseconds(lambda: decode(spec, layout, pool, x, pairs, tile))
            tiles = tile_table(routes, slots, tile.pairs, send)
            return _microseconds(lambda: prefill(spec, layout, pool, x, pairs, tiles, tile))

        return timer

    return timer_for


def _microseconds(call: Callable[[], object]) -> float:
    milliseconds: Any = triton.testing.do_bench(call, return_mode="median")
    return float(milliseconds) * 1e3
