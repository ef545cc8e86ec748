"""Policies that give each expert a value and let values compete for slots; the arithmetic is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebius.gpu_cache.slots import SlotTable, divide
from moebius.kernels.numba import residency
from moebius.kernels.numba.bundle import bundle

_PROFILE_STEPS = 32  # that a profile counts for, so that a wrong one is soon forgotten


@dataclass(frozen=True, slots=True)
class Rule:
    """What a policy values.

    Args:
        kind: `residency.RECENCY`, `COUNT` or `FEATURES`.
        half_lives: steps of a layer after which a use counts half, one average of use each; features come from here on.
        weights: of each average, then of pairs, links and a constant, in coming uses per step; the prior if learned.
        paired: whether to count which experts follow which.
        linked: whether to learn what the experts of the layers before say.
        learned: whether the weights are learned online.
        frozen_after: steps of a layer after which values stay as they are, 0 for never.
        per_layer: whether each layer has its share of the slots, instead of all competing for all.
    """

    kind: int
    half_lives: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    paired: bool = False
    linked: bool = False
    learned: bool = False
    frozen_after: int = 0
    per_layer: bool = False


class ValuedPolicy:
    """A `CachePolicy` by the `rule` of its class.

    Args:
        experts: number of experts of each layer of the pool.
        price: cost of an upload in units of what a miss costs more than a hit.
    """

    rule: Rule

    def __init__(self, experts: Sequence[int], price: float = 1.0) -> None:
        rule, self._experts = self.rule, list(experts)
        self._certainty: np.ndarray = np.ones(max(experts, default=0))
        keys, layers, averages = sum(experts), len(self._experts), len(rule.half_lives)
        features = len(rule.weights)
        pairs = [count * count if rule.paired else 0 for count in self._experts]
        flags = (rule.kind, rule.learned, rule.paired, rule.linked, rule.frozen_after, rule.per_layer)
        # The share of experts that a step uses is followed, that of slots known from the first table on.
        self._facts: np.ndarray = np.array([price, 1 / 8, 1 / 4])
        self._shares: np.ndarray = np.zeros(layers + 1, np.int64)
        value = np.zeros(keys)
        linked, first_links = layers if rule.linked else 0, _first_links(self._experts)
        most = max(self._experts, default=0)
        self.state: tuple[np.ndarray, ...] = (  # in the order of residency.KINDS
            np.array(flags, np.int64),
            self._facts,
            _starts(self._experts),
            self._shares,
            np.zeros(layers, np.int64),
            value,
            np.zeros(keys) if rule.linked else value,
            1 - 0.5 ** (1 / np.array(rule.half_lives, np.float64)),
            np.zeros((averages, keys)),
            _starts(pairs)[:-1].copy(),
            np.zeros(sum(pairs), np.float32),
            np.zeros((2, keys if rule.paired else 0), np.float32),
            np.zeros((keys if features else 0, features)),
            np.zeros((3, features, features)),
            np.array([rule.weights, rule.weights], np.float64).reshape(2, features),
            first_links[:-1].reshape(layers, residency.LAGS),
            np.zeros(first_links[-1] if rule.linked else 0, np.float32),
            np.zeros((linked, residency.LAGS, most), np.float32),
            np.full((linked, residency.MOST), -1, np.int32),
            np.full((linked, residency.LAGS, residency.MOST), -1, np.int64),
        )
        self.words: np.ndarray = bundle(self.state, residency.KINDS)
        self._bound: tuple[SlotTable, np.ndarray] | None = None
        self.price = price

    @property
    def price(self) -> float:
        """Cost of an upload in units of what a miss costs more than a hit; to be kept current by the cache's owner."""
        return float(self._facts[residency.PRICE])

    @price.setter
    def price(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"the price of an upload is {value}; it must be a finite number of misses, 0 or more")
        self._facts[residency.PRICE] = value

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        """See `CachePolicy.used`."""
        residency.observe(self.words, layer, np.ascontiguousarray(experts, np.int32))

    def place(
        self, table: SlotTable, layer: int, experts: np.ndarray, reason: int, chances: np.ndarray | None = None
    ) -> np.ndarray:
        """See `CachePolicy.place`."""
        if not len(experts):
            return np.empty(0, np.int32)
        likely = self._certainty[: len(experts)] if chances is None else np.ascontiguousarray(chances, np.float64)
        wanted = np.ascontiguousarray(experts, np.int32)
        return residency.choose(self.words, self.bind(table), layer, wanted, likely, int(reason))

    def use(self, layer: int) -> np.ndarray:
        """Share of the layer's steps that used each expert, as far as this policy remembers, float64 [E]."""
        first, end = self.state[residency.BASE][layer : layer + 2]
        if self.rule.kind == residency.FEATURES:
            return self.state[residency.AVERAGES][-1, first:end].copy()
        if self.rule.kind == residency.COUNT:
            return self.state[residency.VALUE][first:end] / max(int(self.state[residency.STEPS][layer]), 1)
        raise ValueError("the cache policy lru remembers no shares of use; choose another one to make a profile")

    def start_from(self, layer: int, use: np.ndarray) -> None:
        """Take shares of use (float [E], of steps) for what `_PROFILE_STEPS` steps have taught."""
        first, end = self.state[residency.BASE][layer : layer + 2]
        self.state[residency.STEPS][layer] = _PROFILE_STEPS
        self.state[residency.AVERAGES][:, first:end] = use
        self.state[residency.VALUE][first:end] = use * (1 if self.rule.kind == residency.RECENCY else _PROFILE_STEPS)
        if self.rule.kind == residency.FEATURES:
            self.used(layer, np.empty(0, np.int32), np.empty(0, bool))  # which values the experts

    def bind(self, table: SlotTable) -> np.ndarray:
        """The table's arrays as a bundle of `residency.TABLE`; sees to shares of as many slots."""
        if self._bound is None or self._bound[0] is not table:
            self._facts[residency.ROOM] = table.slots / len(table.slot_of)
            if self.rule.per_layer:
                self._shares[1:] = np.cumsum(divide(table.slots, self._experts))
            # last, so that an interrupt before it leaves nothing half done
            self._bound = table, bundle((table.key_of, table.state, table.pins), residency.TABLE)
        return self._bound[1]


def _starts(counts: Sequence[int]) -> np.ndarray:
    """Where each part begins, and the end of the last, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _first_links(experts: Sequence[int]) -> np.ndarray:
    """Where the links of each layer from each of the `LAGS` layers before begin, and the end, int64 [L * LAGS + 1]."""
    earlier = [
        [experts[(layer - 1 - lag) % len(experts)] for lag in range(residency.LAGS)] for layer in range(len(experts))
    ]
    return _starts([count * other for count, others in zip(experts, earlier, strict=True) for other in others])
