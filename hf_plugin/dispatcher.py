"""Split one layer's work between the processors: hits where they are cached, misses on the CPU at the same time."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import Launch
from moebius.kernels.routes import Routes, build_routes, select
from moebius.predictors.costs import CostModel

if TYPE_CHECKING:
    from moebius.hf_plugin.layer import PatchedLayer
    from moebius.hf_plugin.runtime import ModelRuntime


class Predictions(threading.local):
    """What was foreseen for the coming layers of this thread's tokens: experts, and which of them were resident."""

    def __init__(self) -> None:
        self.of_layer: dict[int, tuple[np.ndarray, np.ndarray]] = {}


class Launched(NamedTuple):
    """A launch whose time is not counted yet."""

    launch: Launch
    tokens: np.ndarray  # of each of its experts, int32 [A]


@dataclass(slots=True)
class Tier:
    """One device's share of a model: its cache, where that is, and what experts cost there and on the CPU."""

    cache: ExpertCache
    device: torch.device
    costs: CostModel
    launches: dict[int, Launched] = field(default_factory=dict)  # of each layer the last, until its time is counted
    predictions: Predictions = field(default_factory=Predictions)
    shrunk: int = 0  # how often, since the device had no memory for others

    def observe_copies(self) -> None:
        """Let the cost of an upload follow the link, by the copies that have completed meanwhile, and the price it."""
        times = self.cache.copy_times()
        for took_us in times:
            self.costs.observe_upload(took_us)
        if times:
            self.cache.price = self.costs.price


class Step(NamedTuple):
    """One call of a layer, as both processors need it."""

    x: torch.Tensor  # [T, H] where the model computes
    host_x: torch.Tensor  # the same in host memory
    routes: Routes


def run_layer(
    runtime: ModelRuntime, layer: PatchedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the routed experts' outputs, [T, H] on x's device in x's dtype.

    Args:
        x: hidden states [T, H].
        ids: integer [T, k]; -1 and E mean no expert.
        weights: float [T, k].

    Raises:
        ValueError: ids outside -1..E.
    """
    host_x, host_ids, host_weights = to_host(x, ids, weights)
    routes = build_routes(host_ids, host_weights, layer.store.num_experts)
    step = Step(x, host_x, routes)
    if runtime.recorder is not None:
        runtime.recorder.record(layer.index, host_ids, host_weights)
    counters = runtime.counters[layer.index]
    counters.tokens += layer.tokens(len(x))
    out = torch.zeros(host_x.shape, dtype=torch.float32)
    tier = runtime.tiers.get(layer.index)
    if tier is None:
        counters.misses += len(routes.tokens)
        if runtime.host is not None:
            layer.gate.settle(x, ids)
            _prefetch(runtime, layer.index, x)
        _on_cpu(runtime, layer, step, routes, out)
        return out.to(x.device, x.dtype)
    _judge_prediction(runtime, tier, layer.index, routes)
    layer.gate.settle(x, ids)
    return _on_both(runtime, tier, layer, step, out)


def to_host(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Hidden states, ids and float32 weights in host memory, by one copy where they are on a device."""
    if x.device.type == "cpu":
        return x.contiguous(), ids.numpy(), weights.float().numpy()
    parts = (x.contiguous(), ids.to(torch.int32), weights.float())
    host = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts]).cpu()
    pieces = host.split([part.nbytes for part in parts])
    host_x, host_ids, host_weights = (
        piece.clone().view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True)
    )
    return host_x, host_ids.numpy(), host_weights.numpy()


def _on_both(runtime: ModelRuntime, tier: Tier, layer: PatchedLayer, step: Step, out: torch.Tensor) -> torch.Tensor:
    index, routes, cache, counters = layer.index, step.routes, tier.cache, runtime.counters[layer.index]
    try:
        slots = cache.lookup(index, routes.experts)
        hit = slots >= 0
        pairs = routes.counts
        counters.hits += int(pairs[hit].sum())
        counters.misses += int(pairs[~hit].sum())
        _fetch(tier, index, routes.experts, pairs, slots)
        resident = slots >= 0
        launch = None
        if resident.any():
            launch = cache.launch(index, step.x.to(tier.device), select(routes, resident), slots[resident])
        _prefetch(runtime, index, step.x)
        if not resident.all():
            rest = select(routes, ~resident)
            took = _on_cpu(runtime, layer, step, rest, out)
            tier.costs.cpu.observe(pairs[~resident], took * 1e6)
        if launch is None:
            merged = out.to(step.x.device, step.x.dtype)
        else:
            merged = _merge(runtime, tier, index, Launched(launch, pairs[resident]), out, step.x)
    finally:
        cache.finish(index)
    cache.used(index, routes.experts, hit)
    cache.admit(index, routes.experts[~resident])
    tier.observe_copies()
    return merged


def _on_cpu(runtime: ModelRuntime, layer: PatchedLayer, step: Step, routes: Routes, out: torch.Tensor) -> float:
    begun = perf_counter()
    runtime.on_cpu(layer, step.host_x, routes, out)
    took = perf_counter() - begun
    runtime.counters[layer.index].cpu_ms += took * 1e3
    return took


def _fetch(tier: Tier, index: int, experts: np.ndarray, pairs: np.ndarray, slots: np.ndarray) -> None:
    """Bring in those misses that finish earlier on the device; their slots are entered into `slots`."""
    missing = np.flatnonzero(slots < 0)
    if not len(missing):
        return
    chosen = missing[tier.costs.fetch(pairs[missing], pairs[slots >= 0])]
    if len(chosen):
        slots[chosen] = tier.cache.fetch(index, experts[chosen])


def _merge(
    runtime: ModelRuntime, tier: Tier, index: int, launched: Launched, out: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    begun = perf_counter()
    on_device = launched.launch.result()
    runtime.counters[index].wait_ms += (perf_counter() - begun) * 1e3
    runtime.count_launch(index)
    tier.launches[index] = launched
    return (on_device + out.to(on_device.device)).to(x.device, x.dtype)


def _prefetch(runtime: ModelRuntime, index: int, x: torch.Tensor) -> None:
    """Foresee the next layer's experts and bring in those that are absent, wherever that layer computes."""
    predicted = runtime.predictor.predict(index, x)
    if predicted is None:
        return
    predicted = predicted[(predicted >= 0) & (predicted < runtime.stores[index + 1].num_experts)]
    if runtime.host is not None:
        runtime.host.read_ahead(index + 1, predicted)
    tier = runtime.tiers.get(index + 1)
    if tier is None:
        return
    resident = tier.cache.visible(index + 1, predicted)
    tier.predictions.of_layer[index + 1] = (predicted, resident)
    tier.cache.prefetch(index + 1, predicted[~resident])


def _judge_prediction(runtime: ModelRuntime, tier: Tier, index: int, routes: Routes) -> None:
    foreseen = tier.predictions.of_layer.pop(index, None)
    if foreseen is not None:
        predicted, resident = foreseen
        runtime.accuracy[index].record(predicted, resident, routes.experts)
