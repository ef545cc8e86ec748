"""One layer's experts in the slots of its pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from moebius.gpu_cache.device import Device, Launch
from moebius.gpu_cache.executor import Executor
from moebius.gpu_cache.policy import Reason
from moebius.gpu_cache.pool import Pool
from moebius.kernels.routes import Routes

_ADMIT, _PREFETCH = Reason.ADMIT, Reason.PREFETCH


class LayerCache:
    """What one layer asks of the cache.

    A step is ``lookup``, then ``fetch`` and ``launch`` as the caller likes, then ``used``, ``admit`` and ``finish``;
    ``prefetch`` may come at any time. Methods must be called by one thread at a time, whatever the layer. A copy or a
    prefetch that failed raises RuntimeError at the next call but `launch`, `used` and `finish`; the cache stays usable.

    Args:
        local: the layer's number in the pool.
        execute: computes its experts on the device.
    """

    def __init__(self, device: Device, pool: Pool, local: int, execute: Executor) -> None:
        self._device, self._local, self._execute = device, local, execute
        self._pool: Pool | None = pool

    def serve_from(self, pool: Pool | None) -> None:
        """Slots are in this pool from now on, or nowhere, and calls raise RuntimeError."""
        self._pool = pool

    @property
    def _sound(self) -> Pool:
        pool = self._open
        if not pool.sound:
            pool.recover()
        return pool

    @property
    def _open(self) -> Pool:
        if self._pool is None:
            raise RuntimeError("the expert cache is closed; patch the model again")
        return self._pool

    def lookup(self, experts: np.ndarray) -> np.ndarray:
        """Ready slot of each expert (int32 [A], distinct) or -1, int32 [A]; hits are pinned until `finish`."""
        pool = self._sound
        pool.withdraw(self._local)
        pool.collect()
        return pool.claim(self._local, experts)

    def slots(self) -> np.ndarray:
        """Slot of each expert that `lookup` would return, int32 [E], -1 for none; a view, to be read."""
        table = self._sound.table
        return table.visible[table.first(self._local) : table.first(self._local + 1)]

    def fetch(self, experts: np.ndarray) -> np.ndarray:
        """Upload experts (int32 [n], distinct) that this step computes on the device.

        Returns:
            Slots to hand to `launch`, which waits for the copies, int32 [n]; -1 where none can be had. Pinned as hits.
        """
        pool, local = self._sound, self._local
        pool.collect()
        slots = pool.claim(local, experts, loading=True)  # first: what came since `lookup` could go again
        missing = (slots < 0).nonzero()[0]
        if len(missing):
            pool.demand(local, experts[missing])
            slots[missing] = pool.claim(local, experts[missing], loading=True)
        return slots

    def launch(self, x: torch.Tensor, routes: Routes, slots: np.ndarray, onto: Launch | None = None) -> Launch:
        """Start computing on the device.

        Args:
            x: [T, H] on the device, unchanged until the result is there.
            routes: A experts.
            slots: int32 [A] from `lookup` and `fetch` of this step; -1 for experts that are left out.
            onto: an earlier launch of this step, whose result this one adds to and takes over.

        Returns:
            A launch whose ``result()`` is the weighted sum over `routes` in slots, fp32 [T, H] on the device.
        """
        pool = self._sound
        work = partial(self._execute, pool.memory, x, routes, slots.copy())
        if onto is not None:
            work = partial(_add_to, onto, work)
        launch = self._device.compute(work, pool.arrivals(slots))
        pool.launched(launch)
        return launch

    def wait(self, slots: np.ndarray) -> None:
        """Block until the copies into `slots` (int32 [n], from `fetch` of this step) have ended.

        Raises:
            Exception: what made a copy fail.
        """
        for copy in self._sound.arrivals(slots):
            copy.wait()
            if copy.error is not None:
                raise copy.error

    def arrived(self, slots: np.ndarray, wait: bool = False) -> bool:
        """Whether all copies into slots (int32 [n]) of this step have ended; `wait` blocks until they have."""
        pool = self._sound
        if wait:
            for copy in pool.arrivals(slots):
                copy.wait()
        pool.collect()
        return not pool.arrivals(slots)

    def release(self, slots: np.ndarray) -> None:
        """Give up slots of this step (int32 [n], distinct, from `lookup` or `fetch`), once their launch has begun.

        They may be displaced from now on, by copies that begin when the launch has ended.
        """
        self._sound.release(self._local, slots)

    def finish(self) -> None:
        """End the step that `lookup` began: its slots may be displaced, once the launches that read them have ended."""
        self._open.finish(self._local)

    def used(self, experts: np.ndarray, hit: np.ndarray) -> None:
        """Tell the policy: one step used `experts` (int32 [A], distinct), `hit` (bool [A]) were resident before it."""
        self._sound.policy.used(self._local, experts, hit)

    def admit(self, experts: np.ndarray) -> int:
        """Offer experts (int32 [n], distinct) that missed; the policy decides. Returns how many are queued or begun."""
        return self._offer(experts, _ADMIT, None)

    def prefetch(self, experts: np.ndarray, chances: np.ndarray | None = None) -> int:
        """Offer experts (int32 [n], distinct, likeliest first) predicted for a coming step, like `admit`.

        `chances` are the probabilities that the layer uses them, float64 [n]; without them it is certain to.

        Those that are resident or on their way cost nothing and do not count. They go before admissions; those whose
        copy has not begun when `lookup` begins the layer are withdrawn.
        """
        return self._offer(experts, _PREFETCH, chances)

    def _offer(self, experts: np.ndarray, reason: Reason, chances: np.ndarray | None) -> int:
        pool = self._sound
        pool.collect()
        return pool.offer(self._local, experts, reason, chances) if len(experts) else 0

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert."""
        return self._open.nbytes

    @property
    def memory(self) -> torch.Tensor:
        """The slots that the layer's experts share with those of others, uint8 [S, nbytes] on the device."""
        return self._sound.memory


def _add_to(earlier: Launch, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The sum with an earlier launch, in its memory; launches of a device run one after the other."""
    total = earlier.result()
    return total.add_(work())
