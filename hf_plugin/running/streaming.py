"""The device's share of one layer step: resident experts at once, fetched ones in chunks, each as it has arrived."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.device import Launch
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.kernels.numba.slots import scatter
from moebius.kernels.routes import Routes
from moebius.predictors.costs import Assignment

# A chunk is fetched, then computed while the next one is on the link. 32 MiB take a 25 GB/s link 1.3 ms, many times
# what a launch takes the host. One chunk is computed, one is being copied and one stands behind it, so that the link
# does not wait for the host.
CHUNK_BYTES = 32 << 20
WINDOW = 3
_ABSENT = np.int32(-1)


class Launched(NamedTuple):
    """A launch and what it computes."""

    launch: Launch
    slots: np.ndarray  # of each of the step's experts, int32 [A]; -1 for those that it does not compute
    tokens: np.ndarray  # of each of the step's experts, int32 [A]

    @property
    def computed(self) -> np.ndarray:
        """Tokens of each expert that it computes, int32 [n]."""
        return self.tokens[self.slots >= 0]


class DeviceShare:
    """What the device computes in one step of a layer; the launches add up in the last one's result.

    Fetched experts go through a window of slots: where more are wanted than fit into it, the slots of a chunk are given
    up as soon as its copies have arrived and its launch stands in line, and later chunks take their turn.

    Args:
        cache: of the layer.
        x: [T, H] on the device.
        slots: of each of the routes' experts, int32 [A], -1 for absent ones; pinned.
        wanted: what the device should compute.
    """

    def __init__(
        self, cache: LayerCache, x: torch.Tensor, routes: Routes, slots: np.ndarray, wanted: Assignment
    ) -> None:
        self._cache, self._x, self._routes = cache, x, routes
        self.launched: list[Launched] = []
        self._tokens = wanted.tokens
        self._waiting = wanted.fetches  # those that are still to be fetched
        self._under_way: deque[np.ndarray] = deque()  # slots of each chunk
        self._window = WINDOW
        self._residents: np.ndarray = slots  # pinned until they, too, are needed as a window
        self.fetched = np.zeros(len(slots), bool)
        if wanted.residents:  # those that the CPU takes over are left out
            all_of_them = wanted.residents + len(wanted.absent) == len(slots)
            self._launch(slots if all_of_them else np.where(wanted.on_device, slots, _ABSENT))
        if len(wanted.fetches):
            self.advance()

    @property
    def waiting(self) -> bool:
        """Whether experts are still to be fetched."""
        return len(self._waiting) > 0

    def advance(self, wait: bool = False) -> None:
        """Begin as many chunks as the window takes; where `wait` is set, wait for its oldest chunk first if need be."""
        size = max(1, CHUNK_BYTES // self._cache.record_bytes)
        while self.waiting and self._make_room(wait):
            wait = False
            chunk, rest = self._waiting[:size], self._waiting[size:]
            slots = self._cache.fetch(self._routes.experts[chunk])
            if len(missing := (slots < 0).nonzero()[0]):
                if len(missing) == len(chunk):
                    self._shrink()
                    continue
                rest = np.concatenate([chunk[missing], rest])
                chunk, slots = chunk[slots >= 0], slots[slots >= 0]
            self._waiting = rest
            self.fetched[chunk] = True
            self._under_way.append(slots)
            self._launch(scatter(len(self.fetched), chunk, slots))

    def _shrink(self) -> None:
        """There are no more slots than those under way; without any, the residents', which are launched, must do."""
        self._window = len(self._under_way)
        residents = self._residents[self._residents >= 0]
        if not self._window and len(residents):
            self._cache.release(residents)
            self._residents, self._window = residents[:0], 1

    def finish(self) -> np.ndarray:
        """Begin all that still waits; indices of the experts that no slot could be had for."""
        while self.waiting and self._window:
            self.advance(wait=True)
        return self._waiting

    def _make_room(self, wait: bool) -> bool:
        """Whether another chunk may begin."""
        if len(self._under_way) < self._window:
            return True
        if not self._under_way or not self._cache.arrived(self._under_way[0], wait):
            return False
        self._cache.release(self._under_way.popleft())
        return True

    def _launch(self, slots: np.ndarray) -> None:
        """Compute the experts that are in `slots` (int32 [A]), and add what was launched before."""
        before = self.launched[-1].launch if self.launched else None
        launch = self._cache.launch(self._x, self._routes, slots, before)
        self.launched.append(Launched(launch, slots, self._tokens))
