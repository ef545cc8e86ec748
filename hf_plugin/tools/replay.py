"""Judge cache policies and predictors by replay of recorded routing, with the live classes and their compiled code.

All k experts of a layer step are one event; a hit was resident before it, and hits and misses are counted per (token,
layer, rank). An upload decided at an event is resident when that layer comes round for the next token, a prefetch when
its layer begins. The cache has floor(capacity * E) slots per layer, or that times L in one pool, and starts empty.
Cost is (misses + r * uploads) / requests, for an upload that costs r times what a miss costs more than a hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moebius.gpu_cache.policy import POLICIES, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.tools.trace_file import Trace
from moebius.kernels.numba import clairvoyant
from moebius.kernels.numba.replay import COUNTS, HITS, PREFETCHES, UPLOADS, USED_PREFETCHES, replay
from moebius.predictors.forecaster import Forecaster

PREDICTORS = ("none", "ids")
ROUNDS = 60  # of the bound's search for prices
_NOTHING = np.zeros((0, 0, 0), np.int8)
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """How a policy with a predictor did; see the module for the terms."""

    policy: str
    predictor: str
    hit_rate: float
    uploads_per_token: float
    cost: float
    prefetches_per_token: float  # of the uploads
    prefetch_precision: float | None  # share of prefetched experts that were used before they left; None without any


@dataclass(frozen=True, slots=True)
class Bound:
    """What no cache can do better, even if it knew the future.

    Args:
        hit_rate: highest with equal slots for each layer: Belady, with the freedom to bypass; attained.
        cost: lower bound with equal slots for each layer (Lagrangian relaxation, about 1 % below what is attainable);
            with a predictor, uploads may come before the first use, else they follow a miss.
        pooled_hit_rate: as `hit_rate`, if all layers share the slots.
        pooled_cost: as `cost`, if all layers share the slots.
    """

    hit_rate: float
    cost: float
    pooled_hit_rate: float
    pooled_cost: float


@dataclass(frozen=True, slots=True)
class Result:
    """Rows in the order asked for, and the bound."""

    trace: str
    capacity: float
    upload_cost: float
    cold: bool
    tokens: int
    rows: list[Row]
    bound: Bound

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    trace: Trace,
    capacity: float,
    policies: Sequence[str],
    predictor: str = "none",
    upload_cost: float = 1.0,
    cold: bool = False,
    progress: Progress = lambda step, done: None,
) -> Result:
    """Replay a trace through each policy.

    Args:
        capacity: share of each layer's experts that the cache holds, in (0, 1].
        policies: names in `policy.POLICIES`.
        predictor: a name in `PREDICTORS`; it prefetches what pays at this upload cost.
        upload_cost: r, in misses.
        cold: forget everything between sequences.

    Raises:
        ValueError: an argument is outside its range, or a name is unknown.
    """
    _check(trace, capacity, policies, predictor, upload_cost)
    rows = []
    for number, name in enumerate(policies):
        progress(name, number / (len(policies) + 1))
        counts, _ = run(trace, capacity, name, predictor, upload_cost, cold)
        rows.append(_row(trace, name, predictor, upload_cost, counts))
    progress("bound", len(policies) / (len(policies) + 1))
    bound = find_bound(trace, capacity, upload_cost, predictor != "none", cold)
    return Result(trace.name, capacity, upload_cost, cold, trace.tokens, rows, bound)


def run(
    trace: Trace,
    capacity: float,
    policy: str,
    predictor: str = "none",
    upload_cost: float = 1.0,
    cold: bool = False,
    outcome: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Replay a trace through one policy.

    Returns:
        Counts by layer, int64 [L, COUNTS] as in `moebius.kernels.numba.replay`; whether each request was a hit, int8
        [T, L, k], empty unless `outcome`.
    """
    counts = np.zeros((trace.layers, COUNTS), np.int64)
    parts = []
    for ids in _stretches(trace, cold):
        hits = np.zeros(ids.shape, np.int8) if outcome else _NOTHING
        _run_stretch(trace.experts, ids, capacity, policy, predictor, upload_cost, counts, hits)
        parts.append(hits)
    return counts, np.concatenate(parts) if outcome else _NOTHING


def find_bound(trace: Trace, capacity: float, upload_cost: float, prefetch: bool = False, cold: bool = False) -> Bound:
    """The clairvoyant bounds of a trace; see `Bound` and `moebius.kernels.numba.clairvoyant`."""
    slots = slots_per_layer(trace, capacity)
    lives = np.zeros(trace.tokens, np.int64)
    if cold:
        lives = np.repeat(np.arange(len(trace.offsets) - 1), np.diff(trace.offsets))
    single = np.zeros(2)
    for layer in range(trace.layers):
        single += _bound(trace.ids[:, layer : layer + 1], lives, trace.experts, slots, upload_cost, prefetch)
    pooled = _bound(trace.ids, lives, trace.experts, slots * trace.layers, upload_cost, prefetch)
    return Bound(*(float(number) for number in np.concatenate([single, pooled]) / trace.ids.size))


def slots_per_layer(trace: Trace, capacity: float) -> int:
    """floor(capacity * E); raises ValueError where that is none."""
    slots = int(capacity * trace.experts + 1e-9)
    if not 0 < capacity <= 1 or slots < 1:
        least = 1 / trace.experts
        raise ValueError(f"capacity {capacity} must be in (0, 1] and hold an expert: at least {least:.4f} here")
    return slots


def _check(trace: Trace, capacity: float, policies: Sequence[str], predictor: str, upload_cost: float) -> None:
    slots_per_layer(trace, capacity)
    for name in policies:
        if name not in POLICIES:
            raise ValueError(f"cache policy {name!r} is unknown; choose from {', '.join(POLICIES)}")
    if predictor not in PREDICTORS:
        raise ValueError(
            f"predictor {predictor!r} cannot be replayed: a trace has ids only; choose one of {', '.join(PREDICTORS)}"
        )
    if not 0 <= upload_cost < float("inf"):
        raise ValueError(f"upload cost {upload_cost} must be a finite number of misses, 0 or more")


def _stretches(trace: Trace, cold: bool) -> Iterator[np.ndarray]:
    if not cold:
        yield trace.ids
        return
    for start, stop in zip(trace.offsets[:-1], trace.offsets[1:], strict=True):
        yield trace.ids[start:stop]


def _run_stretch(
    experts: int, ids: np.ndarray, capacity: float, name: str, predictor: str, price: float, counts: np.ndarray,
    outcome: np.ndarray,
) -> None:  # fmt: skip
    layers, top_k = ids.shape[1:]
    policy = make_policy(name, [experts] * layers, price)
    table = SlotTable([experts] * layers, int(capacity * experts + 1e-9) * layers)
    policy.bind(table)
    forecaster = Forecaster([experts] * layers if predictor == "ids" else [], top_k, rows=1)
    # Below the break-even point of `residency` nothing is worth offering; beyond 1 nothing is foreseen at all.
    least = max(price / (1 + price), 0.01) if predictor == "ids" else 2.0
    arrays = (table.base, table.slot_of, table.visible, table.key_of, table.state, table.pins)
    unproven = np.zeros(experts * layers, np.bool_)
    replay(policy.words, arrays, forecaster.words, ids, least, unproven, counts, outcome)


def _row(trace: Trace, policy: str, predictor: str, price: float, counts: np.ndarray) -> Row:
    total = counts.sum(0)
    requests, issued = trace.ids.size, int(total[PREFETCHES])
    return Row(
        policy,
        predictor,
        float(total[HITS] / requests),
        float(total[UPLOADS] / trace.tokens),
        float((requests - total[HITS] + price * total[UPLOADS]) / requests),
        issued / trace.tokens,
        float(total[USED_PREFETCHES] / issued) if issued else None,
    )


def _bound(ids: np.ndarray, lives: np.ndarray, experts: int, slots: int, price: float, prefetch: bool) -> np.ndarray:
    """Most hits and least cost of some layers (ids [T, L', k]) that share `slots`; a key lives for one life only."""
    layers, top_k = ids.shape[1:]
    keys = ids + experts * (np.arange(layers)[:, None] + layers * lives[:, None, None])
    uses, count = np.ascontiguousarray(keys.reshape(-1), np.int64), int(experts * layers * (lives[-1] + 1))
    before, after = clairvoyant.neighbours(uses, top_k, count)
    hits = clairvoyant.most_hits(uses, after, top_k, count, experts, slots)
    cost = clairvoyant.least_cost(uses, before, top_k, count, slots, price, prefetch, ROUNDS)
    return np.array([hits, cost])
