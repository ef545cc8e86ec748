"""Experts that would be good to have in slots, and that nobody waits for: a bounded queue, prefetches first."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import numpy as np

from moebius.gpu_cache.policy import Reason

DEMAND, PREFETCH = Reason.DEMAND, Reason.PREFETCH  # Python 3.11 takes 0.3 us to find a member of an enumeration


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


class Wishes:
    """A queue of experts, none of them twice."""

    def __init__(self) -> None:
        self._waiting: list[Wish] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        """How many experts wait."""
        return sum(len(wish.experts) for wish in self._waiting)

    def lacks(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Which of a layer's experts (int32 [n]) do not wait, bool [n]."""
        lacking = np.ones(len(experts), bool)
        for wish in self._waiting:
            if wish.layer == layer:
                lacking &= ~np.isin(experts, wish.experts)
        return lacking

    def add(self, wish: Wish) -> None:
        """Put experts, of which none waits, at the end."""
        self._waiting.append(wish)

    def take(self, most: int) -> Wish:
        """Take the experts whose turn it is out of the queue, which is not empty."""
        first = next((i for i, wish in enumerate(self._waiting) if wish.reason is PREFETCH), 0)
        wish = self._waiting.pop(first)
        if len(wish.experts) > most:
            self._waiting.insert(first, wish.part(slice(most, None)))
        return wish.part(slice(most))

    def withdraw(self, layers: Container[int]) -> list[Wish]:
        """Take the prefetches for these layers out of the queue."""
        former, self._waiting = self._waiting, []
        withdrawn: list[Wish] = []
        for wish in former:
            (withdrawn if wish.reason is PREFETCH and wish.layer in layers else self._waiting).append(wish)
        return withdrawn

    def clear(self) -> None:
        """Forget all of them."""
        self._waiting.clear()
