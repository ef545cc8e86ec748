"""One pool of slots in device memory: the table, the bytes, and the copies under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.counters import Counters
from moebius.gpu_cache.device import Completion, Device, Launch, Transfer
from moebius.gpu_cache.policy import CachePolicy, Reason
from moebius.gpu_cache.slots import SlotTable

FLYING_COPIES = 2  # see `Device.flying_bytes`
# Admissions and prefetches that wait for their turn are bounded as well, since they grow stale: 64 MiB with the former.
QUEUED_BYTES = 64 << 20

DEMAND, PREFETCH = Reason.DEMAND, Reason.PREFETCH  # Python 3.11 takes 0.3 us to find a member of an enumeration

# Told of each copy that begins: layer (the cache's number), expert, why, and the copy.
Watch = Callable[[int, int, Reason, Transfer], None]


@dataclass(slots=True)
class Upload:
    """A copy under way."""

    layer: int
    expert: int
    completion: Transfer
    awaited: bool = False  # by a launch, which reports a failure itself


class Wish(NamedTuple):
    """Experts of a layer that wait for slots."""

    layer: int
    reason: Reason
    experts: np.ndarray  # int32 [n], the most wanted first
    chances: np.ndarray | None  # probability that the layer's next step uses each, float [n]; None for certainty

    def part(self, which: slice | np.ndarray) -> Wish:
        """Some of them."""
        chances = None if self.chances is None else self.chances[which]
        return Wish(self.layer, self.reason, self.experts[which], chances)


class Pool:
    """Slots for the experts of all layers of one record size.

    Experts that nobody waits for are queued and get a slot when their copy is handed over to the device, so that until
    then the slot serves the expert in it, and whoever lost his reason is withdrawn at no cost.

    Args:
        layers: the cache's numbers of these layers, by which `counters` are indexed; all else here counts from 0.
        records: host records of each layer, uint8 [E, nbytes].
        slots: number of slots, at least 1.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[int],
        records: Sequence[torch.Tensor],
        slots: int,
        policy: CachePolicy,
        counters: Counters,
    ) -> None:
        self._device, self._layers, self._records = device, layers, records
        self.policy, self._counters = policy, counters
        self.nbytes: int = records[0].shape[1]
        self.table = SlotTable([len(layer) for layer in records], slots)
        self.memory: torch.Tensor = device.allocate(slots, self.nbytes)
        self.sound = True  # false within a change of several parts, and after one that was interrupted; see `reset`
        self.copy_times: list[float] = []  # microseconds, of the copies that completed since somebody took them
        self.watch: Watch | None = None
        self._waiting: list[Wish] = []  # in order, no expert twice
        self._uploads: dict[int, Upload] = {}  # by slot
        self._readers: list[Completion | None] = [None] * slots  # last computation that reads each slot
        self._unproven: np.ndarray = np.zeros(slots, bool)  # holds a prefetch that nobody has used
        half = max(1, slots // 2)
        self._flying_limit = min(half, max(FLYING_COPIES, device.flying_bytes // self.nbytes))
        self._queued_limit = min(half, max(FLYING_COPIES, QUEUED_BYTES // self.nbytes))

    def collect(self) -> None:
        """Publish the copies that have completed, and hand over those that wait.

        Raises:
            RuntimeError: copies failed; their slots are free again.
        """
        if self._uploads:
            self._report(self._reap())
        self._hand_over()

    def claim(self, layer: int, experts: np.ndarray, loading: bool = False) -> np.ndarray:
        """Pin the slots in which experts (int32 [n]) are ready, or `loading`, and count prefetches among them as used.

        Returns:
            The slots, int32 [n], -1 for none.
        """
        slots, proven = self.table.claim(layer, experts, self._unproven, loading)
        if proven:
            self._counters.prefetch_used[self._layers[layer]] += proven
        return slots

    def demand(self, layer: int, experts: np.ndarray) -> None:
        """Begin copies of experts (int32 [n], in no slot) that somebody waits for, as far as there are slots."""
        if len(experts):
            self._place(Wish(layer, DEMAND, experts, None))

    def offer(self, layer: int, experts: np.ndarray, reason: Reason, chances: np.ndarray | None = None) -> int:
        """Queue experts (int32 [n], the most wanted first) that the policy may give a slot, as far as the queue goes.

        Args:
            chances: probability that the layer's next step uses each expert, float [n]; None for certainty.

        Returns:
            How many of them are now under way or waiting, and were not before.
        """
        wish, flying = Wish(layer, reason, experts, chances), len(self._uploads)
        at_once = not self._waiting and flying + len(experts) <= self._flying_limit
        if at_once and not self.table.any_there(layer, experts):  # what decode mostly asks for
            return self._place(wish)
        absent = self.table.occupied(layer, experts) < 0
        for other in self._waiting:
            if other.layer == layer:
                absent &= ~np.isin(experts, other.experts)
        before = self._queued()
        if not len(chosen := np.flatnonzero(absent)[: max(self._queued_limit - flying - before, 0)]):
            return 0
        self._waiting.append(wish.part(chosen))
        return self._hand_over() + self._queued() - before

    def _queued(self) -> int:
        return sum(len(wish.experts) for wish in self._waiting)

    def withdraw(self, layer: int) -> None:
        """Give up the prefetches for a layer that have not begun."""
        if self._waiting:
            self._cancel([layer])

    def arrivals(self, slots: np.ndarray) -> list[Completion]:
        """Copies into `slots` that are still under way; the caller takes over the report of their failure."""
        if not self._uploads:
            return []
        pending = [self._uploads[slot] for slot in slots.tolist() if slot in self._uploads]
        for upload in pending:
            upload.awaited = True
        return [upload.completion for upload in pending]

    def read_by(self, slots: np.ndarray, launch: Launch) -> None:
        """Nothing may overwrite `slots`, of which negative ones are none, before `launch` has ended."""
        completion = launch.completion
        for slot in slots.tolist():
            if slot >= 0:
                self._readers[slot] = completion

    def drain(self) -> None:
        """Wait for all copies, those that wait included, and publish them; raises like `collect`."""
        failed: list[Upload] = []
        while self._uploads or self._waiting:
            for upload in list(self._uploads.values()):
                upload.completion.wait()
            failed += self._reap()
            self._hand_over()
        self._report(failed)

    def settle(self) -> None:
        """Wait for everything that reads or writes the memory, failures included."""
        self._device.finish_copies()
        for under_way in [*(upload.completion for upload in self._uploads.values()), *self._readers]:
            if under_way is not None:
                under_way.wait()

    def reset(self) -> None:
        """Settle and forget all contents, pins included, in whatever state an interrupt has left them."""
        self.sound = False
        self.settle()
        self._cancel(range(self.table.layers))
        for slot in np.flatnonzero(self._unproven & (self.table.key_of >= 0)).tolist():
            self._count_waste(slot)
        self._waiting.clear()
        self._uploads.clear()
        self._unproven.fill(False)
        self.table.clear()
        self.sound = True

    def resident(self) -> np.ndarray:
        """Visible experts of each layer, int64 [L of the pool]."""
        return np.add.reduceat(self.table.visible >= 0, self.table.base[:-1], dtype=np.int64)

    def _hand_over(self) -> int:
        """Begin copies of what waits, prefetches first, while the device has few; how many."""
        begun = 0
        while self._waiting and (room := self._flying_limit - len(self._uploads)) > 0:
            first = next((i for i, wish in enumerate(self._waiting) if wish.reason is PREFETCH), 0)
            wish = self._waiting.pop(first)
            if len(wish.experts) > room:
                self._waiting.insert(first, wish.part(slice(room, None)))
                wish = wish.part(slice(room))
            absent = self.table.occupied(wish.layer, wish.experts) < 0  # others were demanded meanwhile
            begun += self._place(wish.part(absent))
        return begun

    def _place(self, wish: Wish) -> int:
        """Begin copies of the experts that the policy gives a slot; how many."""
        layer, reason, experts, chances = wish
        begun = 0
        slots = self.policy.place(self.table, layer, experts, reason, chances).tolist()
        for slot, expert in zip(slots, experts.tolist(), strict=True):
            if slot >= 0:
                self._begin(slot, layer, expert, reason)
                begun += 1
        return begun

    def _cancel(self, layers: Sequence[int]) -> None:
        """Give up the prefetches for these layers that wait."""
        former, self._waiting = self._waiting, []
        for wish in former:
            if wish.reason is PREFETCH and wish.layer in layers:
                self._counters.prefetch_cancelled[self._layers[wish.layer]] += len(wish.experts)
            else:
                self._waiting.append(wish)

    def _reap(self) -> list[Upload]:
        """Publish what has completed; the uploads that failed without anybody who waits for them."""
        done = {slot: upload for slot, upload in self._uploads.items() if upload.completion.done()}
        if not done:
            return []
        self.sound = False
        for slot, upload in done.items():
            del self._uploads[slot]
            if upload.completion.error is None:
                self.table.publish(slot)
                self._count_copy(upload)
            else:
                self._release(slot)
        self.sound = True
        return [upload for upload in done.values() if upload.completion.error is not None and not upload.awaited]

    def _report(self, failed: list[Upload]) -> None:
        if failed:
            names = ", ".join(f"{upload.expert} of layer {self._layers[upload.layer]}" for upload in failed)
            raise RuntimeError(f"uploading expert {names} to the device failed") from failed[0].completion.error

    def _begin(self, slot: int, layer: int, expert: int, reason: Reason) -> None:
        self.sound = False
        self._count_waste(slot)
        self.table.reserve(slot, layer, expert)  # makes the former expert invisible, before the copy starts
        source = self._records[layer][expert]
        try:
            completion = self._device.copy(self.memory[slot], source, self._readers[slot], reason is DEMAND)
        except Exception:
            self.table.release(slot)
            self.sound = True
            raise
        self._uploads[slot] = Upload(layer, expert, completion)
        if self.watch is not None:
            self.watch(self._layers[layer], expert, reason, completion)
        self._unproven[slot] = reason is PREFETCH
        self._count_upload(self._layers[layer], reason)
        self.sound = True

    def _release(self, slot: int) -> None:
        self._count_waste(slot)
        self.table.release(slot)

    def _count_upload(self, number: int, reason: Reason) -> None:
        self._counters.uploads[number] += 1
        self._counters.upload_bytes[number] += self.nbytes
        self._counters.prefetch_issued[number] += reason is PREFETCH
        self._counters.demand_fetches[number] += reason is DEMAND

    def _count_copy(self, upload: Upload) -> None:
        took = upload.completion.elapsed_us()
        self._counters.copies[self._layers[upload.layer]] += 1
        self._counters.copy_us[self._layers[upload.layer]] += took
        self.copy_times.append(took)

    def _count_waste(self, slot: int) -> None:
        if self._unproven[slot]:
            self._counters.prefetch_wasted[self._layers[self.table.layer_and_expert(slot)[0]]] += 1
            self._unproven[slot] = False
