"""Which expert deserves a slot. Policies see indices only, never a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np

from moebius.gpu_cache.slots import SlotTable, State, divide


class Reason(IntEnum):
    """Why an expert wants a slot."""

    ADMIT = 0  # it missed and was computed on the CPU: worth a slot for its coming uses?
    PREFETCH = 1  # predicted for a coming layer
    DEMAND = 2  # needed in this very step: any slot that can be had


class CachePolicy(Protocol):
    """What a cache asks and tells the policy of one pool.

    Admission and eviction are one decision: `place` either names the slot to take, and with it the expert that leaves,
    or declines. Knowledge belongs to experts (`SlotTable.keys`), not to slots, and so survives a change of the budget.

    Args:
        experts: number of experts of each layer of the pool.
    """

    def __init__(self, experts: Sequence[int]) -> None: ...

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        """One layer step used `experts` (int32 [A], distinct), of which `hit` (bool [A]) were resident before it."""

    def place(self, table: SlotTable, layer: int, experts: np.ndarray, reason: Reason) -> np.ndarray:
        """Choose a slot for each expert, int32 [n], -1 where none is worth taking or can be had.

        Args:
            table: the pool's slots, read only. Slots outside ``table.takeable()`` must not be chosen, none twice.
            experts: int32 [n], distinct, the most wanted first, none of them in a slot.
        """


class LRU:
    """Least recently used, one cache per layer, admits every miss.

    Events are atomic: all experts of a layer step are equally recent, so none of them displaces another. A prefetch
    counts as a use at the time it is issued, else a second prefetch would displace the first.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts: np.ndarray = np.asarray(experts, np.int64)
        self._base: np.ndarray = np.concatenate([[0], np.cumsum(self._experts)])
        self._last: np.ndarray = np.zeros(int(self._base[-1]), np.int64)  # of each key: step of its layer, 0 = never
        self._clock: np.ndarray = np.zeros(len(self._experts), np.int64)
        self._bounds: dict[int, np.ndarray] = {}

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        self._clock[layer] += 1
        self._last[self._base[layer] + experts] = self._clock[layer]

    def place(self, table: SlotTable, layer: int, experts: np.ndarray, reason: Reason) -> np.ndarray:
        start, stop = self._share(table.slots, layer)
        free = table.state[start:stop] == State.FREE
        age = np.where(free, -1, self._last[table.key_of[start:stop]])
        limit = self._clock[layer] + (reason is Reason.DEMAND)
        candidates = np.flatnonzero(table.takeable()[start:stop] & (age < limit))
        chosen = candidates[np.argsort(age[candidates], kind="stable")][: len(experts)]
        slots = np.full(len(experts), -1, np.int32)
        slots[: len(chosen)] = start + chosen
        self._last[self._base[layer] + experts[: len(chosen)]] = self._clock[layer]
        return slots

    def _share(self, slots: int, layer: int) -> tuple[int, int]:
        if slots not in self._bounds:
            self._bounds = {slots: np.concatenate([[0], np.cumsum(divide(slots, self._experts.tolist()))])}
        bounds = self._bounds[slots]
        return int(bounds[layer]), int(bounds[layer + 1])


POLICIES: dict[str, type[CachePolicy]] = {"lru": LRU}


def make_policy(name: str, experts: Sequence[int]) -> CachePolicy:
    """A fresh policy for a pool.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in POLICIES:
        raise ValueError(f"cache policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](experts)
