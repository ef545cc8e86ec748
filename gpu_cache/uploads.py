"""Copies under way into the slots of one pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from moebius.gpu_cache.device import Transfer


@dataclass(slots=True, eq=False)
class Upload:
    """A copy under way, of one expert or of several."""

    layer: int
    experts: list[int]
    slots: np.ndarray  # int32 [n]
    completion: Transfer
    awaited: bool = False  # by a launch, which reports a failure itself


class Uploads:
    """The copies under way, in the order in which they began."""

    def __init__(self) -> None:
        self._under_way: list[Upload] = []
        self.experts = 0  # in all of them

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def __iter__(self) -> Iterator[Upload]:
        return iter(self._under_way)

    def add(self, layer: int, experts: list[int], slots: np.ndarray, copies: Sequence[Transfer]) -> list[Upload]:
        """Take note of the copies of experts into slots (int32 [n]), as `Device.copy_all` began them."""
        added, begin = [], 0
        for copy, its in groupby(copies):
            end = begin + sum(1 for _ in its)
            added.append(Upload(layer, experts[begin:end], slots[begin:end], copy))
            begin = end
        self._under_way += added
        self.experts += begin
        return added

    def into(self, slots: np.ndarray) -> list[Upload]:
        """Those into any of `slots`, int32 [n]."""
        wanted = set(slots.tolist())
        return [upload for upload in self._under_way if not wanted.isdisjoint(upload.slots.tolist())]

    def take_ended(self) -> list[Upload]:
        """Forget those that have ended, well or not, and return them."""
        ended = [upload for upload in self._under_way if upload.completion.done()]
        for upload in ended:
            self._under_way.remove(upload)
            self.experts -= len(upload.experts)
        return ended

    def clear(self) -> None:
        """Forget all of them."""
        self._under_way.clear()
        self.experts = 0
