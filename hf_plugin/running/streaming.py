"""The device's share of one layer step: resident experts at once, fetched ones in chunks, each as it has arrived."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import Launch
from moebius.kernels.routes import Routes, select
from moebius.predictors.costs import Assignment

# A chunk is fetched, then computed while the next one is on the link. 32 MiB take a 25 GB/s link 1.3 ms, many times
# what a launch takes the host. One chunk is computed, one is being copied and one stands behind it, so that the link
# does not wait for the host.
CHUNK_BYTES = 32 << 20
WINDOW = 3
_NOTHING = np.empty(0, np.int64)


class Launched(NamedTuple):
    """A launch and what it computes."""

    launch: Launch
    tokens: np.ndarray  # of each of its experts, int64 [A]


class DeviceShare:
    """What the device computes in one step of a layer; the launches add up in the last one's result.

    Fetched experts go through a window of slots: where more are wanted than fit into it, the slots of a chunk are given
    up as soon as its copies have arrived and its launch stands in line, and later chunks take their turn.

    Args:
        x: [T, H] on the device.
        slots: of each of the routes' experts, int32 [A], -1 for absent ones; pinned.
        wanted: the experts that the device should compute.
    """

    def __init__(
        self, cache: ExpertCache, layer: int, x: torch.Tensor, routes: Routes, slots: np.ndarray, wanted: Assignment
    ) -> None:
        self._cache, self._layer, self._x, self._routes = cache, layer, x, routes
        self.launched: list[Launched] = []
        self._tokens = wanted.tokens
        self._waiting: np.ndarray = _NOTHING  # indices of experts that are still to be fetched, heaviest first
        self._under_way: deque[np.ndarray] = deque()  # slots of each chunk
        self._chunk = max(1, CHUNK_BYTES // cache.record_bytes(layer))
        self._window = WINDOW
        self._residents: np.ndarray = _NOTHING  # pinned until they, too, are needed as a window
        self.fetched = np.zeros(len(slots), bool)
        resident = wanted.on_device
        if wanted.fetches:
            there = slots >= 0
            absent, resident, self._residents = np.flatnonzero(resident & ~there), resident & there, slots[there]
            self._waiting = absent[np.argsort(-self._tokens[absent], kind="stable")]
        if wanted.residents:
            self._launch(resident, slots if wanted.residents == len(slots) else slots[resident])
        self.advance()

    @property
    def waiting(self) -> bool:
        """Whether experts are still to be fetched."""
        return len(self._waiting) > 0

    def advance(self, wait: bool = False) -> None:
        """Begin as many chunks as the window takes; where `wait` is set, wait for its oldest chunk first if need be."""
        while self.waiting and self._make_room(wait):
            wait = False
            chunk = self._waiting[: self._chunk]
            slots = self._cache.fetch(self._layer, self._routes.experts[chunk])
            got = slots >= 0
            if not got.any():
                self._shrink()
                continue
            self._waiting = np.concatenate([chunk[~got], self._waiting[self._chunk :]])
            mask = np.zeros(len(self.fetched), bool)
            mask[chunk[got]] = True
            self.fetched |= mask
            ascending = np.argsort(chunk[got])
            self._under_way.append(slots[got])
            self._launch(mask, slots[got][ascending])

    def _shrink(self) -> None:
        """There are no more slots than those under way; without any, the residents', which are launched, must do."""
        self._window = len(self._under_way)
        if not self._window and len(self._residents):
            self._cache.release(self._layer, self._residents)
            self._residents, self._window = self._residents[:0], 1

    def finish(self) -> np.ndarray:
        """Begin all that still waits; indices of the experts that no slot could be had for."""
        while self.waiting and self._window:
            self.advance(wait=True)
        return self._waiting

    def _make_room(self, wait: bool) -> bool:
        """Whether another chunk may begin."""
        if len(self._under_way) < self._window:
            return True
        if not self._under_way or not self._cache.arrived(self._layer, self._under_way[0], wait):
            return False
        self._cache.release(self._layer, self._under_way.popleft())
        return True

    def _launch(self, mask: np.ndarray, slots: np.ndarray) -> None:
        """Compute the experts of `mask` (bool [A]), which are in `slots`, and add what was launched before."""
        before, all_of_them = self.launched[-1].launch if self.launched else None, len(slots) == len(mask)
        routes = self._routes if all_of_them else select(self._routes, mask)
        launch = self._cache.launch(self._layer, self._x, routes, slots, before)
        self.launched.append(Launched(launch, self._tokens if all_of_them else self._tokens[mask]))
