"""Split one layer's work between the processors: hits where they are cached, misses on the CPU at the same time."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.cache import ExpertCache
from moebius.kernels.routes import Routes, build_routes, select

if TYPE_CHECKING:
    from moebius.hf_plugin.layer import PatchedLayer
    from moebius.hf_plugin.runtime import ModelRuntime


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
    counters = runtime.counters[layer.index]
    counters.tokens += len(x)
    out = torch.zeros(host_x.shape, dtype=torch.float32)
    if runtime.cache is None:
        counters.misses += len(routes.tokens)
        _on_cpu(runtime, layer, step, routes, out)
        return out.to(x.device, x.dtype)
    _judge_prediction(runtime, layer, routes)
    layer.gate.settle(x, ids)
    return _on_both(runtime, runtime.cache, layer, step, out)


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


def _on_both(
    runtime: ModelRuntime, cache: ExpertCache, layer: PatchedLayer, step: Step, out: torch.Tensor
) -> torch.Tensor:
    index, routes, counters = layer.index, step.routes, runtime.counters[layer.index]
    slots = cache.lookup(index, routes.experts)
    try:
        hit = slots >= 0
        pairs = routes.counts
        counters.hits += int(pairs[hit].sum())
        counters.misses += int(pairs[~hit].sum())
        _fetch(runtime, cache, index, routes, slots)
        resident = slots >= 0
        launch = None
        if resident.any():
            on_device = step.x.to(runtime.torch_device)
            launch = cache.launch(index, on_device, select(routes, resident), slots[resident])
        _prefetch(runtime, cache, index, step.x)
        if not resident.all():
            rest = select(routes, ~resident)
            took = _on_cpu(runtime, layer, step, rest, out)
            runtime.costs.cpu.observe(rest.counts, took * 1e6)
        merged = _merge(runtime, index, launch, out, step.x)
    finally:
        cache.finish(index)
    cache.used(index, routes.experts, hit)
    cache.admit(index, routes.experts[~resident])
    return merged


def _on_cpu(runtime: ModelRuntime, layer: PatchedLayer, step: Step, routes: Routes, out: torch.Tensor) -> float:
    begun = perf_counter()
    runtime.executor.run(layer.store, step.host_x, routes, out)
    took = perf_counter() - begun
    runtime.counters[layer.index].cpu_ms += took * 1e3
    return took


def _fetch(runtime: ModelRuntime, cache: ExpertCache, index: int, routes: Routes, slots: np.ndarray) -> None:
    """Bring in those misses that finish earlier on the device; their slots are entered into `slots`."""
    missing = np.flatnonzero(slots < 0)
    if not len(missing):
        return
    pairs = routes.counts
    chosen = missing[runtime.costs.fetch(pairs[missing], pairs[slots >= 0])]
    if len(chosen):
        slots[chosen] = cache.fetch(index, routes.experts[chosen])


def _merge(runtime: ModelRuntime, index: int, launch: object, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if launch is None:
        return out.to(x.device, x.dtype)
    begun = perf_counter()
    on_device = launch.result()
    runtime.counters[index].wait_ms += (perf_counter() - begun) * 1e3
    runtime.count_launch(index)
    runtime.launches[index] = launch
    return (on_device + out.to(on_device.device)).to(x.device, x.dtype)


def _prefetch(runtime: ModelRuntime, cache: ExpertCache, index: int, x: torch.Tensor) -> None:
    """Foresee the next layer's experts and bring in those that are absent."""
    predicted = runtime.predictor.predict(index, x)
    if predicted is None:
        return
    predicted = predicted[(predicted >= 0) & (predicted < runtime.stores[index + 1].num_experts)]
    resident = cache.visible(index + 1, predicted)
    runtime.pending.__dict__[index + 1] = (predicted, resident)
    cache.prefetch(index + 1, predicted[~resident])


def _judge_prediction(runtime: ModelRuntime, layer: PatchedLayer, routes: Routes) -> None:
    pending = runtime.pending.__dict__.pop(layer.index, None)
    if pending is not None:
        runtime.accuracy[layer.index].record(*pending, routes.experts)
