"""Which expert deserves a slot. Policies see indices only, never a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np

from moebius.gpu_cache.slots import SlotTable
from moebius.gpu_cache.values import Rule, ValuedPolicy
from moebius.kernels.numba.residency import ADMIT, COUNT, DEMAND, FEATURES, PREFETCH, RECENCY


class Reason(IntEnum):
    """Why an expert wants a slot."""

    ADMIT = ADMIT  # it missed and was computed on the CPU: worth a slot for its coming uses?
    PREFETCH = PREFETCH  # predicted for a coming layer
    DEMAND = DEMAND  # needed in this very step: any slot that can be had


class CachePolicy(Protocol):
    """What a cache asks and tells the policy of one pool.

    Admission and eviction are one decision: `place` either names the slot to take, and with it the expert that leaves,
    or declines. Knowledge belongs to experts (`SlotTable.keys`), not to slots, and so survives a change of the budget.

    Args:
        experts: number of experts of each layer of the pool.
        price: cost of an upload in units of what a miss costs more than a hit. It may be changed at any time.
    """

    price: float

    def __init__(self, experts: Sequence[int], price: float = 1.0) -> None: ...

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        """One layer step used `experts` (int32 [A], distinct), of which `hit` (bool [A]) were resident before it."""

    def place(
        self, table: SlotTable, layer: int, experts: np.ndarray, reason: Reason, chances: np.ndarray | None = None
    ) -> np.ndarray:
        """Choose a slot for each expert, int32 [n], -1 where none is worth taking or can be had.

        Args:
            table: the pool's slots, read only. Slots outside ``table.takeable()`` must not be chosen, none twice.
            experts: int32 [n], distinct, the most wanted first, none of them in a slot.
            chances: for a prefetch, the probability that the layer's next step uses each expert, float [n]; else, and
                where it is not known, None, which counts as certainty.
        """


class LRU(ValuedPolicy):
    """Least recently used, one cache per layer, admits every miss.

    Events are atomic: all experts of a layer step are equally recent, so none of them displaces another. A prefetch
    counts as a use at the time it is issued, else a second prefetch would displace the first.
    """

    rule = Rule(RECENCY, per_layer=True)


class Static(ValuedPolicy):
    """The experts used most in the first 1024 steps of each layer; what is read on demand afterwards is a guest."""

    rule = Rule(COUNT, frozen_after=1024)


class LFU(ValuedPolicy):
    """Least frequently used; a miss is admitted if it was used more often than the weakest resident expert."""

    rule = Rule(COUNT)


class MRS(ValuedPolicy):
    """HybriMoE's score S <- a u + (1 - a) S with a = 1/2 (arXiv:2504.05897), and admission where a swap pays.

    The cache knows no router scores, so that u is 1 for each used expert and 0 for the others. The weight gives the
    margin that is best on real routing where an upload costs a miss; from 0.16 to 0.18 it is best at other prices.
    """

    rule = Rule(FEATURES, (1,), (0.165, 0.0, 0.0, 0.0))


class EMA(ValuedPolicy):
    """Exponential average of use with a half-life of 16 steps; a miss is admitted where the swap pays."""

    rule = Rule(FEATURES, (16,), (1.0, 0.0, 0.0, 0.0))


class EMATable(ValuedPolicy):
    """`EMA`, and what followed the experts just used before, counted online."""

    rule = Rule(FEATURES, (16,), (0.7, 0.7, 0.0, 0.0), paired=True)


class Default(ValuedPolicy):
    """Expected coming uses, learned online from use at four half-lives, what followed what, and the layers before.

    The value of an expert is its expected number of uses within the horizon over which an upload has to pay, so that a
    swap pays where values differ by more than the price. The weights are the same for all experts of a pool; what the
    experts of the three layers before say is learned for each pair of experts, in ``12 L E^2`` bytes.
    """

    rule = Rule(
        FEATURES, (4, 16, 64, 512), (0.15, 0.5, 0.15, 0.0, 0.3, 1.0, 0.0), paired=True, linked=True, learned=True
    )


POLICIES: dict[str, type[ValuedPolicy]] = {
    "lru": LRU,
    "static": Static,
    "lfu": LFU,
    "mrs": MRS,
    "ema": EMA,
    "ema_table": EMATable,
    "default": Default,
}


def make_policy(name: str, experts: Sequence[int], price: float = 1.0) -> ValuedPolicy:
    """A fresh policy for a pool.

    Raises:
        ValueError: the name is unknown, or the price is negative or not finite.
    """
    if name not in POLICIES:
        raise ValueError(f"cache policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](experts, price)
