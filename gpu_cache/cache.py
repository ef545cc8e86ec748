"""The GPU tier of a model: experts in slots of device memory, computed there, loaded and displaced meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.counters import Counters
from moebius.gpu_cache.device import Device
from moebius.gpu_cache.event_log import EventLog
from moebius.gpu_cache.executor import make_executor
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.gpu_cache.policy import make_policy
from moebius.gpu_cache.pool import Pool, Watch
from moebius.gpu_cache.step_buffers import StepBuffers
from moebius.kernels.experts import ExpertSpec, RecordLayout

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

    Steps go through `layer`. Methods must be called by one thread at a time.

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
        self._layers: dict[int, LayerCache] = {}
        slots = self._divide(budget)
        undo: list[Callable[[], None]] = []
        self._give_back = weakref.finalize(self, _run_all, undo)  # also where nobody calls close
        undo.append(device.close)
        try:
            self._pools = self._make_pools(slots)
            widest = max(layer.spec.hidden for layer in served.values())
            self.buffers: StepBuffers | None = device.step_buffers(_ROWS * (4 * widest + _ROUTING_BYTES))
            send = None if self.buffers is None else self.buffers.send
            for number, layer in served.items():
                execute = make_executor(layer.spec, layer.layout, device.torch_device, send)
                pool, local = self._home[number]
                self._layers[number] = LayerCache(device, self._pools[pool], local, execute)
            for records in self._records.values():  # last: they may take all the memory that can be pinned
                if device.pin(records):
                    undo.insert(1, partial(device.unpin, records))
        except BaseException:
            self._give_back()
            raise

    def layer(self, number: int) -> LayerCache:
        """What a step of that layer asks for; it stays the same when the budget changes."""
        self._open_pools()
        return self._layers[number]

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

    def drain(self) -> None:
        """Wait until no copy is under way or waits for its turn."""
        errors = []
        for pool in self._pools:
            try:
                pool.recover()
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
        if under_way := [layer for pool in self._pools for layer in pool.under_way]:
            raise RuntimeError(f"resize was called while layer {under_way[0]} is computing; call it between")
        former = [pool.table.slots for pool in self._pools]
        try:
            self._drop_pools()
            self.device.trim()  # else torch keeps the block, lets others have a piece of it, and no pool fits there
            self._pools = self._make_pools(slots)
        except BaseException:
            if former:
                self._pools = self._make_pools(former)
            raise

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
            for layer in self._layers.values():
                layer.serve_from(None)
            self._layers, self._pools, self.buffers = {}, [], None
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

    def _open_pools(self) -> list[Pool]:
        if not self._pools:
            raise RuntimeError("the expert cache is closed; patch the model again")
        return self._pools

    def _divide(self, budget: int) -> list[int]:
        sizes = [self._records[group[0]].shape[1] for group in self._groups]
        experts = [sum(len(self._records[layer]) for layer in group) for group in self._groups]
        return _divide_budget(budget, sizes, experts)

    def _make_pools(self, slots: list[int]) -> list[Pool]:
        pools = [
            Pool(self.device, group, [self._records[i] for i in group], count, policy, self.counters)
            for group, count, policy in zip(self._groups, slots, self._policies, strict=True)
        ]
        for number, layer in self._layers.items():
            layer.serve_from(pools[self._home[number][0]])
        return pools

    def _drop_pools(self) -> None:
        for pool in self._pools:
            pool.reset()
        for layer in self._layers.values():
            layer.serve_from(None)
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


def _run_all(steps: list[Callable[[], None]]) -> None:
    """In their order; each is taken, whatever the others raise."""
    with ExitStack() as stack:
        for step in reversed(steps):
            stack.callback(step)
