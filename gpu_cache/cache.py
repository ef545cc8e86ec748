"""The GPU tier of a model: experts in slots of device memory, computed there, loaded and displaced meanwhile."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.counters import Counters
from moebius.gpu_cache.device import Device, Launch
from moebius.gpu_cache.event_log import EventLog
from moebius.gpu_cache.executor import Executor, make_executor
from moebius.gpu_cache.policy import Reason, make_policy
from moebius.gpu_cache.pool import Pool, Watch
from moebius.gpu_cache.step_buffers import StepBuffers
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import Routes

logger = logging.getLogger(__name__)

# Tokens of a step up to which its inputs and its sum cross between host and device through kept buffers, and bytes for
# the routing of one: 64 ids and weights in fp32, and what the next layer's router says of 256 experts.
_ROWS, _ROUTING_BYTES = 64, 2048


class CachedLayer(NamedTuple):
    """One layer's experts as the host stores them."""

    spec: ExpertSpec
    layout: RecordLayout
    records: torch.Tensor  # uint8 [E, layout.nbytes], host, contiguous; must neither move nor change


class ExpertCache:
    """Experts of all layers in device slots under one byte budget.

    One step of a layer is ``lookup``, then ``fetch`` and ``launch`` as the caller likes, then ``used``, ``admit`` and
    ``finish``; ``prefetch`` may come at any time. Methods must be called by one thread at a time. A copy or a prefetch
    that failed raises RuntimeError at the next call but `launch`, `used`, `finish` and `close`; the cache stays usable.

    Args:
        device: from `open_device`; the cache closes it.
        layers: all layers of the model, numbered in this order; None for one that another device's cache serves.
        budget: bytes of device memory for slots.
        policy: a name in `policy.POLICIES`.

    Raises:
        ValueError: the budget does not hold one record of each size, or the policy is unknown.
    """

    def __init__(self, device: Device, layers: Sequence[CachedLayer | None], budget: int, policy: str = "lru") -> None:
        self.device: Device = device
        served = {number: layer for number, layer in enumerate(layers) if layer is not None}
        self._records = {number: layer.records for number, layer in served.items()}
        self._groups = _by_record_size(self._records)
        self._policies = [make_policy(policy, [len(self._records[i]) for i in group]) for group in self._groups]
        self.counters: Counters = Counters.zeros(len(layers))
        self._home: dict[int, tuple[int, int]] = {  # of each layer: its pool, its number there
            layer: (pool, local) for pool, group in enumerate(self._groups) for local, layer in enumerate(group)
        }
        self._pinned: dict[int, list[np.ndarray]] = {}
        slots = self._divide(budget)
        undo: list[Callable[[], None]] = []
        self._give_back = weakref.finalize(self, _run_all, undo)  # also where nobody calls close
        undo.append(device.close)
        try:
            self._pools = self._make_pools(slots)
            widest = max(layer.spec.hidden for layer in served.values())
            self.buffers: StepBuffers | None = device.step_buffers(_ROWS * (4 * widest + _ROUTING_BYTES))
            send = None if self.buffers is None else self.buffers.send
            self._executors: dict[int, Executor] = {
                number: make_executor(layer.spec, layer.layout, device.torch_device, send)
                for number, layer in served.items()
            }
            for records in self._records.values():  # last: they may take all the memory that can be pinned
                if device.pin(records):
                    undo.insert(1, partial(device.unpin, records))
        except BaseException:
            self._give_back()
            raise

    def lookup(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Ready slot of each expert (int32 [A], distinct) or -1, int32 [A]; hits are pinned until ``finish(layer)``."""
        pool, local = self._pool(layer)
        pool.withdraw(local)
        pool.collect()
        return self._claim(layer, pool, local, experts)

    def slots_of(self, layer: int) -> np.ndarray:
        """Slot of each of a layer's experts that `lookup` would return, int32 [E], -1 for none; a view, to be read."""
        pool, local = self._pool(layer)
        return pool.table.visible[pool.table.first(local) : pool.table.first(local + 1)]

    def fetch(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Upload experts (int32 [n], distinct) that this step computes on the device.

        Returns:
            Slots to hand to `launch`, which waits for the copies, int32 [n]; -1 where none can be had. Pinned as hits.
        """
        pool, local = self._pool(layer)
        pool.collect()
        slots = self._claim(layer, pool, local, experts, loading=True)  # first: what came since `lookup` could go again
        missing = np.flatnonzero(slots < 0)
        pool.demand(local, experts[missing])
        slots[missing] = self._claim(layer, pool, local, experts[missing], loading=True)
        return slots

    def launch(
        self, layer: int, x: torch.Tensor, routes: Routes, slots: np.ndarray, onto: Launch | None = None
    ) -> Launch:
        """Start computing on the device.

        Args:
            x: [T, H] on the device, unchanged until the result is there.
            routes: A experts.
            slots: int32 [A] from `lookup` and `fetch` of this step; -1 for experts that are left out.
            onto: an earlier launch of this step, whose result this one adds to and takes over.

        Returns:
            A launch whose ``result()`` is the weighted sum over `routes` in slots, fp32 [T, H] on the device.
        """
        pool, _ = self._pool(layer)
        work = partial(self._executors[layer], pool.memory, x, routes, slots.copy())
        if onto is not None:
            work = partial(_add_to, onto, work)
        launch = self.device.compute(work, pool.arrivals(slots))
        pool.read_by(slots, launch)
        return launch

    def wait(self, layer: int, slots: np.ndarray) -> None:
        """Block until the copies into `slots` (int32 [n], from `fetch` of this step) have ended.

        Raises:
            Exception: what made a copy fail.
        """
        for copy in self._pool(layer)[0].arrivals(slots):
            copy.wait()
            if copy.error is not None:
                raise copy.error

    def memory(self, layer: int) -> torch.Tensor:
        """The slots that the layer's experts share with those of others, uint8 [S, nbytes] on the device."""
        return self._pool(layer)[0].memory

    def arrived(self, layer: int, slots: np.ndarray, wait: bool = False) -> bool:
        """Whether all copies into slots (int32 [n]) of this step have ended; `wait` blocks until they have."""
        pool, _ = self._pool(layer)
        if wait:
            for copy in pool.arrivals(slots):
                copy.wait()
        pool.collect()
        return not pool.arrivals(slots)

    def release(self, layer: int, slots: np.ndarray) -> None:
        """Give up slots of this step (int32 [n], distinct, from `lookup` or `fetch`), once their launch has begun.

        They may be displaced from now on, by copies that begin when the launch has ended.
        """
        pool, _ = self._pool(layer)
        pool.sound = False
        self._pinned[layer] = [others[~np.isin(others, slots)] for others in self._pinned[layer]]
        pool.table.unpin(slots)
        pool.sound = True

    def finish(self, layer: int) -> None:
        """End the step that `lookup` began: its slots may be displaced, once the launches that read them have ended."""
        pool = self._open_pools()[self._home[layer][0]]
        sound, pool.sound = pool.sound, False
        pinned = self._pinned.pop(layer, ())
        if sound:  # else it was interrupted, and the next call starts with an empty pool
            for slots in pinned:
                pool.table.unpin(slots)
            pool.sound = True

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        """Tell the policy: one step used `experts` (int32 [A], distinct), `hit` (bool [A]) were resident before it."""
        pool, local = self._pool(layer)
        pool.policy.used(local, experts, hit)

    def record(self) -> list[EventLog]:
        """Empty the cache and record from here on what policies are told and decide, a log for each size of records.

        Decisions repeat exactly if the policies have learned nothing so far. Recording lasts until `resize` or `close`.
        """
        for pool in self._open_pools():
            pool.reset()
        return [EventLog.record(pool) for pool in self._pools]

    def use(self, layer: int) -> np.ndarray:
        """Share of the layer's steps that used each expert, as the policy remembers, float64 [E].

        Raises:
            ValueError: the policy remembers no such thing.
        """
        number, local = self._home[layer]
        return self._policies[number].use(local)

    def start_from(self, uses: Sequence[np.ndarray]) -> None:
        """Let the policy take shares of use, of each of the model's layers (float [E]), for its own experience."""
        for layer, (number, local) in self._home.items():
            self._policies[number].start_from(local, uses[layer])

    def fill(self, uses: Sequence[np.ndarray]) -> None:
        """Upload the experts that are used most, by shares of use as in `start_from`, and wait for them."""
        for number, group in enumerate(self._groups):
            pool = self._pools[number]
            pool.reset()
            shares = np.concatenate([uses[layer] for layer in group])
            chosen = np.argsort(-shares, kind="stable")[: pool.table.slots]
            for local in range(len(group)):
                first, end = pool.table.first(local), pool.table.first(local + 1)
                pool.demand(local, (chosen[(chosen >= first) & (chosen < end)] - first).astype(np.int32))
            pool.drain()

    def admit(self, layer: int, experts: np.ndarray) -> int:
        """Offer experts (int32 [n], distinct) that missed; the policy decides. Returns how many are queued or begun."""
        return self._offer(layer, experts, Reason.ADMIT)

    def prefetch(self, layer: int, experts: np.ndarray, chances: np.ndarray | None = None) -> int:
        """Offer experts (int32 [n], distinct, likeliest first) predicted for a coming layer, like `admit`.

        `chances` are the probabilities that the layer uses them, float64 [n]; without them it is certain to.

        Those that are resident or on their way cost nothing and do not count. They go before admissions; those whose
        copy has not begun when `lookup` begins the layer are withdrawn.
        """
        return self._offer(layer, experts, Reason.PREFETCH, chances)

    def drain(self) -> None:
        """Wait until no copy is under way or waits for its turn."""
        errors = []
        for number, pool in enumerate(self._pools):
            if not pool.sound:
                self._recover(number)
            try:
                pool.drain()
            except RuntimeError as error:  # raised when all pools are drained
                errors.append(error)
        if errors:
            raise RuntimeError("; ".join(str(error) for error in errors)) from errors[0].__cause__

    def resize(self, budget: int) -> None:
        """Change the budget between steps. The cache starts empty; the policy keeps what it knows.

        Raises:
            ValueError: as for the constructor; nothing has changed.
            RuntimeError: a step is under way, or the device has no room; the cache has its former budget then, or no
                slot at all if there is no room for that any more: resize it to less, or close it.
        """
        slots = self._divide(budget)
        if self._pinned:
            raise RuntimeError(
                f"resize was called while layer {next(iter(self._pinned))} is computing; call it between"
            )
        former = [pool.table.slots for pool in self._pools]
        try:
            self._drop_pools()
            self.device.trim()  # else torch keeps the block, lets others have a piece of it, and no pool fits there
            self._pools = self._make_pools(slots)
        except BaseException:
            if former:
                self._pools = self._make_pools(former)
            raise

    def record_bytes(self, layer: int) -> int:
        """Bytes of one expert of a layer."""
        return self._records[layer].shape[1]

    def copy_times(self) -> list[float]:
        """Microseconds of each copy that was seen to complete since the last call."""
        times = [took for pool in self._pools for took in pool.copy_times]
        for pool in self._pools:
            pool.copy_times.clear()
        return times

    def free_memory(self) -> int:
        """Bytes that the device could allocate now, besides those of the slots."""
        return self.device.free_memory()

    def close(self) -> None:
        """Give back device memory, threads and pinned memory. Idempotent; other calls then raise RuntimeError."""
        try:
            self._give_back()
        finally:
            self._pools, self.buffers, self._executors = [], None, {}
            self.device.trim()

    def abandon(self) -> None:
        """Leave everything as it is, in the child of a fork: threads, copies and pages are the parent's."""
        self._give_back.detach()

    @property
    def price(self) -> float:
        """Cost of an upload in units of what a miss costs more than a hit, by which the policy admits; 1 at first."""
        return self._policies[0].price

    @price.setter
    def price(self, value: float) -> None:
        for policy in self._policies:
            policy.price = value

    def watch(self, watch: Watch | None) -> None:
        """Have each copy reported that begins from now on, until None is given or the budget changes."""
        for pool in self._pools:
            pool.watch = watch

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that it serves, ascending."""
        return sorted(self._home)

    @property
    def slots(self) -> int:
        """Slots in all pools."""
        return sum(pool.table.slots for pool in self._pools)

    @property
    def least_bytes(self) -> int:
        """The smallest budget: one record of each size."""
        return sum(self._records[group[0]].shape[1] for group in self._groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, at most the budget."""
        return sum(pool.table.slots * pool.nbytes for pool in self._pools)

    @property
    def resident(self) -> np.ndarray:
        """Visible experts of each layer, int64 [L]."""
        counts = np.zeros_like(self.counters.uploads)
        for pool, group in zip(self._pools, self._groups, strict=False):
            counts[group] = pool.resident()
        return counts

    def _pool(self, layer: int) -> tuple[Pool, int]:
        number, local = self._home[layer]
        pool = self._open_pools()[number]
        if not pool.sound:
            self._recover(number)
        return pool, local

    def _open_pools(self) -> list[Pool]:
        if not self._pools:
            raise RuntimeError("the expert cache is closed; patch the model again")
        return self._pools

    def _recover(self, number: int) -> None:
        """An interrupt (Ctrl-C) came between two halves of a change: what the slots hold is not certain any more."""
        logger.warning("the expert cache was interrupted at a bad moment and starts empty again")
        for layer in self._groups[number]:
            self._pinned.pop(layer, None)
        self._pools[number].reset()

    def _claim(self, layer: int, pool: Pool, local: int, experts: np.ndarray, loading: bool = False) -> np.ndarray:
        """Slots in which experts are ready, or `loading`, int32 [n], -1 for none; pinned until `finish`."""
        pool.sound = False
        slots = pool.claim(local, experts, loading)
        self._pinned.setdefault(layer, []).append(slots.copy())  # the caller may change his
        pool.sound = True
        return slots

    def _offer(self, layer: int, experts: np.ndarray, reason: Reason, chances: np.ndarray | None = None) -> int:
        pool, local = self._pool(layer)
        pool.collect()
        return pool.offer(local, experts, reason, chances) if len(experts) else 0

    def _divide(self, budget: int) -> list[int]:
        sizes = [self._records[group[0]].shape[1] for group in self._groups]
        experts = [sum(len(self._records[layer]) for layer in group) for group in self._groups]
        return _divide_budget(budget, sizes, experts)

    def _make_pools(self, slots: list[int]) -> list[Pool]:
        return [
            Pool(self.device, group, [self._records[i] for i in group], count, policy, self.counters)
            for group, count, policy in zip(self._groups, slots, self._policies, strict=True)
        ]

    def _drop_pools(self) -> None:
        for pool in self._pools:
            pool.reset()
        self._pools = []  # their memory, before new memory is asked for


def _by_record_size(records: dict[int, torch.Tensor]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for number, of_layer in records.items():
        groups.setdefault(of_layer.shape[1], []).append(number)
    return list(groups.values())


def _divide_budget(budget: int, sizes: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Slots of each pool, whose records have `sizes` bytes: one at least, then in proportion to its experts' bytes."""
    if budget < sum(sizes):
        needed = " + ".join(str(size) for size in sizes)
        raise ValueError(f"a GPU budget of {budget} bytes holds no expert of each size ({needed} bytes); give more")
    total = sum(size * count for size, count in zip(sizes, experts, strict=True))
    spare = budget - sum(sizes)
    slots = [1 + min(count - 1, int(spare * count / total)) for count in experts]
    left = budget - sum(size * count for size, count in zip(sizes, slots, strict=True))
    for i, (size, count) in enumerate(zip(sizes, experts, strict=True)):  # the remainders of the division
        extra = min(count - slots[i], left // size)
        slots[i] += extra
        left -= extra * size
    return slots


def _add_to(earlier: Launch, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The sum with an earlier launch, in its memory; launches of a device run one after the other."""
    total = earlier.result()
    return total.add_(work())


def _run_all(steps: list[Callable[[], None]]) -> None:
    """In their order; each is taken, whatever the others raise."""
    with ExitStack() as stack:
        for step in reversed(steps):
            stack.callback(step)
