"""What a patched model did: counters a layer, their sums, and a table to read them in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from moebius.hf_plugin.running.runtime import ModelRuntime


@dataclass(slots=True)
class LayerStats:
    """Counters of one layer, or their sums.

    Tokens count once a call; hits and misses count token-expert pairs, by whether the expert was in the cache when its
    layer began; uploads and prefetches count experts. Times are in milliseconds of wall clock: `cpu_ms` and `gpu_ms`
    while experts ran on either, `wait_ms` while the layer had nothing left to do but to wait for the device.
    """

    name: str = ""
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    uploads: int = 0
    upload_bytes: int = 0
    demand_fetches: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0  # withdrawn before their copy began, and not among the issued
    copies: int = 0  # uploads that have completed
    copy_us: float = 0.0  # microseconds that these were on the link
    forecasts: int = 0  # probabilities given, one for each token and expert
    miscalibrated: float = 0.0  # summed distance between expected uses and uses, by probability
    predicted: int = 0  # token-expert pairs that were at least as likely as not
    predicted_right: int = 0  # of these, used
    predicted_of: int = 0  # pairs used in steps with a forecast
    predicted_absent: int = 0  # experts likely enough for a prefetch, while not resident
    predicted_absent_right: int = 0
    ram_hits: int = 0  # experts of a step on the CPU that were in memory, where memory is a cache of a file
    ram_misses: int = 0  # that had to be read
    disk_reads: int = 0
    disk_bytes: int = 0
    disk_us: float = 0.0  # microseconds that reads took, several at a time
    read_ahead: int = 0  # reads of experts that were foreseen
    read_ahead_used: int = 0
    stall_ms: float = 0.0  # part of cpu_ms in which a step waited for reads
    prefetching: int = 0  # 1 where the predictor prefetches, 0 where it does not or rests; in the sum, so many layers
    predict_ms: float = 0.0  # on the host, for forecasts and what they lead to
    cpu_ms: float = 0.0
    gpu_ms: float = 0.0
    wait_ms: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of token-expert pairs whose expert was resident; 0 before any."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def recall(self) -> float:
        """Share of the used experts that the predictor had thought at least as likely as not; 0 before any."""
        return self.predicted_right / max(self.predicted_of, 1)

    @property
    def precision_absent(self) -> float:
        """Share of the foreseen experts outside the cache that were used: what decides whether a prefetch pays."""
        return self.predicted_absent_right / max(self.predicted_absent, 1)

    @property
    def calibration_error(self) -> float:
        """Mean distance between the probabilities given and the frequencies of use, by probability (ECE)."""
        return self.miscalibrated / max(self.forecasts, 1)


_COUNTERS = tuple(f.name for f in fields(LayerStats) if f.name != "name")


def total(layers: Iterable[LayerStats]) -> LayerStats:
    """The sum of all counters."""
    sums = LayerStats("sum")
    for layer in layers:
        for name in _COUNTERS:
            setattr(sums, name, getattr(sums, name) + getattr(layer, name))
    return sums


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One device's cache.

    Args:
        device: its name; a model spread over several devices has a cache on each.
        layers: how many layers it serves.
        slots: experts that it can hold.
        cache_bytes: bytes of all slots.
        costs: what the dispatcher now reckons with there, in microseconds (see `CostModel.to_dict`).
    """

    device: str
    layers: int
    slots: int
    cache_bytes: int
    costs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of a patched model's counters; `str()` gives a table, `to_dict()` plain data.

    Args:
        device: where the cache lives ("cpu" means there is none).
        policy: the cache policy's name.
        predictor: the routing predictor's name.
        expert_bytes: bytes of all experts in host memory.
        layers: counters of each layer.
        caches: the cache of each device.
        notes: what a reader should know: fallbacks, layers without prediction, each with its reason.
    """

    device: str
    policy: str
    predictor: str
    expert_bytes: int
    layers: list[LayerStats]
    caches: list[CacheStats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Experts that all caches can hold."""
        return sum(cache.slots for cache in self.caches)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(cache.cache_bytes for cache in self.caches)

    @property
    def costs(self) -> dict[str, Any]:
        """What the dispatcher reckons with on the first device; empty without a cache."""
        return dict(self.caches[0].costs) if self.caches else {}

    @property
    def sums(self) -> LayerStats:
        """All layers together."""
        return total(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Sums at the top, then `layers`: the same counters for each layer, and what the table's title says."""
        facts = {name: getattr(self, name) for name in ("device", "policy", "predictor", "slots", "cache_bytes")}
        facts |= {"expert_bytes": self.expert_bytes, "notes": list(self.notes), "costs": self.costs}
        facts["caches"] = [asdict(cache) for cache in self.caches]
        rows = [{"name": layer.name, **_counters(layer)} for layer in self.layers]
        # every layer sees every token, so that the sum over layers would count each of them many times
        return {**_counters(self.sums), "tokens": max((r["tokens"] for r in rows), default=0), **facts, "layers": rows}

    def __str__(self) -> str:
        from moebius.hf_plugin.stats_table import render

        return render(self)


def _counters(layer: LayerStats) -> dict[str, Any]:
    derived = {name: getattr(layer, name) for name in ("hit_rate", "recall", "precision_absent", "calibration_error")}
    return {name: getattr(layer, name) for name in _COUNTERS} | derived


def stats(model: nn.Module) -> Stats:
    """A snapshot of what the patched `model` has done since `patch` or `reset_stats`.

    Raises:
        ValueError: the model is not patched, or in several parts.
    """
    return _runtime(model).stats()


def reset_stats(model: nn.Module) -> None:
    """Set all counters of the patched `model` to zero; what is in the cache stays there.

    Raises:
        ValueError: the model is not patched, or in several parts.
    """
    _runtime(model).reset_stats()


def _runtime(model: nn.Module) -> ModelRuntime:
    from moebius.hf_plugin.patching import runtimes

    found = runtimes(model)
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} parts of the model were patched one by one; ask for the statistics of each part"
        )
    return found[0]
