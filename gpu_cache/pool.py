"""One pool of slots in device memory: the table, the bytes, and the copies under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moebius.gpu_cache.counters import Counters
from moebius.gpu_cache.device import Completion, Device, Launch
from moebius.gpu_cache.policy import CachePolicy, Reason
from moebius.gpu_cache.slots import SlotTable

# Waiting admissions and prefetches hold slots that serve nobody, so their number is bounded: 64 MiB keep a 25 GB/s link
# busy for 2.7 ms, longer than a layer takes; two copies at least, so that one follows the other without a gap.
QUEUED_BYTES = 64 << 20
QUEUED_COPIES = 2


@dataclass(slots=True)
class Upload:
    """A copy under way."""

    layer: int
    expert: int
    completion: Completion
    awaited: bool = False  # by a launch, which reports a failure itself


class Pool:
    """Slots for the experts of all layers of one record size.

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
        self._uploads: dict[int, Upload] = {}  # by slot
        self._readers: list[Completion | None] = [None] * slots  # last computation that reads each slot
        self._unproven: np.ndarray = np.zeros(slots, bool)  # holds a prefetch that nobody has used
        self._loading_limit = max(1, min(slots // 2, max(QUEUED_COPIES, QUEUED_BYTES // self.nbytes)))

    def collect(self) -> None:
        """Publish the copies that have completed.

        Raises:
            RuntimeError: copies failed; their slots are free again.
        """
        failed: list[Upload] = []
        for slot in [slot for slot, upload in self._uploads.items() if upload.completion.done()]:
            upload = self._uploads.pop(slot)
            if upload.completion.error is None:
                self.table.publish(slot)
                continue
            self._release(slot)
            if not upload.awaited:
                failed.append(upload)
        if failed:
            names = ", ".join(f"{upload.expert} of layer {self._layers[upload.layer]}" for upload in failed)
            raise RuntimeError(f"uploading expert {names} to the device failed") from failed[0].completion.error

    def claim(self, slots: np.ndarray) -> None:
        """Pin slots (int32 [n]) and count the prefetches among them as used."""
        self.table.pin(slots)
        proven = slots[self._unproven[slots]]
        for slot in proven:
            self._counters.prefetch_used[self._layers[self.table.layer_and_expert(slot)[0]]] += 1
        self._unproven[proven] = False

    def upload(self, layer: int, experts: np.ndarray, reason: Reason) -> np.ndarray:
        """Begin copies of the experts (int32 [n]) that the policy gives a slot; their slots, -1 for the others."""
        slots = np.full(len(experts), -1, np.int32)
        room = len(experts) if reason is Reason.DEMAND else max(0, self._loading_limit - len(self._uploads))
        wanted = np.flatnonzero(self.table.occupied(layer, experts) < 0)[:room]
        if len(wanted):
            slots[wanted] = self.policy.place(self.table, layer, experts[wanted], reason)
        for i in wanted:
            if slots[i] >= 0:
                self._begin(int(slots[i]), layer, int(experts[i]), reason)
        return slots

    def arrivals(self, slots: np.ndarray) -> list[Completion]:
        """Copies into `slots` that are still under way; the caller takes over the report of their failure."""
        pending = [self._uploads[slot] for slot in slots.tolist() if slot in self._uploads]
        for upload in pending:
            upload.awaited = True
        return [upload.completion for upload in pending]

    def read_by(self, slots: np.ndarray, launch: Launch) -> None:
        """Nothing may overwrite `slots` before `launch` has ended."""
        for slot in slots.tolist():
            self._readers[slot] = launch.completion

    def drain(self) -> None:
        """Wait for all copies and publish them; raises like `collect`."""
        for upload in list(self._uploads.values()):
            upload.completion.wait()
        self.collect()

    def settle(self) -> None:
        """Wait for everything that reads or writes the memory, failures included."""
        for under_way in [*(upload.completion for upload in self._uploads.values()), *self._readers]:
            if under_way is not None:
                under_way.wait()

    def empty(self) -> None:
        """Forget all contents, after `settle`."""
        self._uploads.clear()
        for slot in range(self.table.slots):
            self._release(slot)

    def resident(self) -> np.ndarray:
        """Visible experts of each layer, int64 [L of the pool]."""
        return np.add.reduceat(self.table.visible >= 0, self.table.base[:-1], dtype=np.int64)

    def _begin(self, slot: int, layer: int, expert: int, reason: Reason) -> None:
        self._count_waste(slot)
        self.table.reserve(slot, layer, expert)  # makes the former expert invisible, before the copy starts
        source = self._records[layer][expert]
        try:
            completion = self._device.copy(self.memory[slot], source, self._readers[slot], reason is Reason.DEMAND)
        except BaseException:
            self.table.release(slot)
            raise
        self._uploads[slot] = Upload(layer, expert, completion)
        self._unproven[slot] = reason is Reason.PREFETCH
        number = self._layers[layer]
        self._counters.uploads[number] += 1
        self._counters.upload_bytes[number] += self.nbytes
        self._counters.prefetch_issued[number] += reason is Reason.PREFETCH
        self._counters.demand_fetches[number] += reason is Reason.DEMAND

    def _release(self, slot: int) -> None:
        self._count_waste(slot)
        self.table.release(slot)

    def _count_waste(self, slot: int) -> None:
        if self._unproven[slot]:
            self._counters.prefetch_wasted[self._layers[self.table.layer_and_expert(slot)[0]]] += 1
            self._unproven[slot] = False
