"""One pool of slots in device memory: the table, the bytes, and the copies under way."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moebius.gpu_cache.counters import Counters
from moebius.gpu_cache.device import Completion, Device, Launch, Transfer
from moebius.gpu_cache.policy import CachePolicy, Reason
from moebius.gpu_cache.slots import SlotTable
from moebius.gpu_cache.uploads import Upload, Uploads
from moebius.gpu_cache.wishes import DEMAND, PREFETCH, Wish, Wishes

logger = logging.getLogger(__name__)

FLYING_COPIES = 2  # see `Device.flying_bytes`
# Admissions and prefetches that wait for their turn are bounded as well, since they grow stale: 64 MiB with the former.
QUEUED_BYTES = 64 << 20

# Launches of a pool that are known apart; they end in their order, so that whoever waits for an older one may as well
# wait for the oldest of these.
_LAUNCHES = 64

# Told of each copy that begins: layer (the cache's number), its experts, why, and the copy.
Watch = Callable[[int, list[int], Reason, Transfer], None]


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
        self._memory, self._experts = self.memory.unbind(), [layer.unbind() for layer in records]  # views, made once
        self._waiting = Wishes()
        self._uploads = Uploads()
        self._pinned: dict[int, list[np.ndarray]] = {}  # slots, of each layer whose step is under way
        self._launches: deque[Completion] = deque(maxlen=_LAUNCHES)  # the last of them; `table.now` counts all
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
            The slots, int32 [n], -1 for none; pinned until `release` or `finish`.
        """
        self.sound = False
        slots, proven = self.table.claim(layer, experts, loading)
        self._pinned.setdefault(layer, []).append(slots.copy())  # the caller may change his
        if proven:
            self._counters.prefetch_used[self._layers[layer]] += proven
        self.sound = True
        return slots

    def release(self, layer: int, slots: np.ndarray) -> None:
        """Give up slots (int32 [n], distinct) that a step of a layer has pinned."""
        self.sound = False
        self._pinned[layer] = [others[~np.isin(others, slots)] for others in self._pinned[layer]]
        self.table.unpin(slots)
        self.sound = True

    def finish(self, layer: int) -> None:
        """Give up all slots that a step of a layer has pinned."""
        sound, self.sound = self.sound, False
        pinned = self._pinned.pop(layer, ())
        if sound:  # else it was interrupted, and the next call finds an empty pool
            for slots in pinned:
                self.table.unpin(slots)
            self.sound = True

    @property
    def under_way(self) -> list[int]:
        """The cache's numbers of the layers that have pinned slots."""
        return [self._layers[layer] for layer in self._pinned]

    def recover(self) -> None:
        """Start empty if an interrupt (Ctrl-C) came between two halves of a change: what slots hold is not certain."""
        if not self.sound:
            logger.warning("the expert cache was interrupted at a bad moment and starts empty again")
            self.reset()

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
        wish, flying = Wish(layer, reason, experts, chances), self._uploads.experts
        at_once = not self._waiting and flying + len(experts) <= self._flying_limit
        if at_once and not self.table.any_there(layer, experts):  # what decode mostly asks for
            return self._place(wish)
        absent = (self.table.occupied(layer, experts) < 0) & self._waiting.lacks(layer, experts)
        before = len(self._waiting)
        if not len(chosen := np.flatnonzero(absent)[: max(self._queued_limit - flying - before, 0)]):
            return 0
        self._waiting.add(wish.part(chosen))
        return self._hand_over() + len(self._waiting) - before

    def withdraw(self, layer: int) -> None:
        """Give up the prefetches for a layer that have not begun."""
        if self._waiting:
            self._cancel([layer])

    def arrivals(self, slots: np.ndarray) -> list[Completion]:
        """Copies into `slots` that are still under way; the caller takes over the report of their failure."""
        pending = self._uploads.into(slots) if self._uploads else []
        for upload in pending:
            upload.awaited = True
        return [upload.completion for upload in pending]

    def launched(self, launch: Launch) -> None:
        """Nothing may overwrite slots that are pinned now before `launch` has ended."""
        self._launches.append(launch.completion)
        self.table.now += 1

    def _readers(self, slots: np.ndarray) -> list[Completion | None]:
        """What was the last launch when each slot was left, or as good as it."""
        oldest = self.table.now - len(self._launches) + 1
        return [self._launches[max(turn - oldest, 0)] if turn else None for turn in self.table.left[slots].tolist()]

    def drain(self) -> None:
        """Wait for all copies, those that wait included, and publish them; raises like `collect`."""
        failed: list[Upload] = []
        while self._uploads or self._waiting:
            for upload in self._uploads:
                upload.completion.wait()
            failed += self._reap()
            self._hand_over()
        self._report(failed)

    def settle(self) -> None:
        """Wait for everything that reads or writes the memory, failures included."""
        self._device.finish_copies()
        for under_way in (*(upload.completion for upload in self._uploads), *self._launches):
            under_way.wait()

    def reset(self) -> None:
        """Settle and forget all contents, pins included, in whatever state an interrupt has left them."""
        self.sound = False
        self.settle()
        self._cancel(range(self.table.layers))
        keys = self.table.key_of[self.table.marks]
        self._count_waste(keys[keys >= 0])
        self._waiting.clear()
        self._uploads.clear()
        self._launches.clear()
        self._pinned.clear()
        self.table.clear()
        self.sound = True

    def resident(self) -> np.ndarray:
        """Visible experts of each layer, int64 [L of the pool]."""
        return np.add.reduceat(self.table.visible >= 0, self.table.base[:-1], dtype=np.int64)

    def _hand_over(self) -> int:
        """Begin copies of what waits, prefetches first, while the device has few; how many."""
        begun = 0
        while self._waiting and (room := self._flying_limit - self._uploads.experts) > 0:
            wish = self._waiting.take(room)
            absent = self.table.occupied(wish.layer, wish.experts) < 0  # others were demanded meanwhile
            begun += self._place(wish.part(absent))
        return begun

    def _place(self, wish: Wish) -> int:
        """Begin copies of the experts that the policy gives a slot; how many."""
        layer, reason, experts, chances = wish
        slots = self.policy.place(self.table, layer, experts, reason, chances)
        given = (slots >= 0).nonzero()[0]
        if reason is DEMAND and len(given):  # what a launch waits for may come as one copy
            self._begin(layer, slots[given], experts[given], reason)
        elif len(given):  # of others each shall be visible as soon as it can be
            for i in given.tolist():
                self._begin(layer, slots[i : i + 1], experts[i : i + 1], reason)
        return len(given)

    def _cancel(self, layers: Sequence[int]) -> None:
        """Give up the prefetches for these layers that wait."""
        for wish in self._waiting.withdraw(layers):
            self._counters.prefetch_cancelled[self._layers[wish.layer]] += len(wish.experts)

    def _reap(self) -> list[Upload]:
        """Publish what has completed; the uploads that failed without anybody who waits for them."""
        self.sound = False
        ended = self._uploads.take_ended()
        for upload in ended:
            if upload.completion.error is None:
                self.table.publish(upload.slots)
                self._count_copies(upload)
            else:
                marked = upload.slots[self.table.marks[upload.slots]]
                self._count_waste(self.table.key_of[marked])
                self.table.marks[marked] = False
                self.table.release(upload.slots)
        self.sound = True
        return [upload for upload in ended if upload.completion.error is not None and not upload.awaited]

    def _report(self, failed: list[Upload]) -> None:
        if failed:
            names = ", ".join(
                f"{expert} of layer {self._layers[upload.layer]}" for upload in failed for expert in upload.experts
            )
            error = failed[0].completion.error
            raise RuntimeError(f"copying expert {names} into the cache failed: {error}") from error

    def _begin(self, layer: int, slots: np.ndarray, experts: np.ndarray, reason: Reason) -> None:
        """Begin the copies of experts of a layer into these slots, int32 [n] both."""
        self.sound = False
        self._count_waste(self.table.reserve(layer, slots, experts))  # hides who was there, before the copies begin
        numbers, records = experts.tolist(), self._experts[layer]
        targets, sources = [self._memory[slot] for slot in slots.tolist()], [records[expert] for expert in numbers]
        try:
            copies = self._device.copy_all(targets, sources, self._readers(slots), reason is DEMAND)
        except Exception:
            if len(numbers) > 1:  # some may have begun
                self._device.finish_copies()
            self.table.release(slots)
            self.sound = True
            raise
        if reason is PREFETCH:
            self.table.marks[slots] = True
        for upload in self._uploads.add(layer, numbers, slots, copies):
            if self.watch is not None:
                self.watch(self._layers[layer], upload.experts, reason, upload.completion)
        self._count_uploads(self._layers[layer], reason, len(numbers))
        self.sound = True

    def _count_uploads(self, number: int, reason: Reason, count: int) -> None:
        counters = self._counters
        counters.uploads[number] += count
        counters.upload_bytes[number] += count * self.nbytes
        if reason is PREFETCH:
            counters.prefetch_issued[number] += count
        elif reason is DEMAND:
            counters.demand_fetches[number] += count

    def _count_copies(self, upload: Upload) -> None:
        took, count = upload.completion.elapsed_us(), len(upload.experts)
        self._counters.copies[self._layers[upload.layer]] += count
        self._counters.copy_us[self._layers[upload.layer]] += count * took
        self.copy_times += [took] * count

    def _count_waste(self, keys: np.ndarray) -> None:
        """Prefetched experts that nobody has used are given up, int64 [n]."""
        for key in keys.tolist():
            self._counters.prefetch_wasted[self._layers[self.table.layer_of(key)]] += 1
