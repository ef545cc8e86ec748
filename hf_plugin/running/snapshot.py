"""What the counters of a patched model say: `stats`, what its user should know beside them, and what it learned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from moebius.hf_plugin.profile import Profile
from moebius.hf_plugin.running.dispatcher import Tier
from moebius.hf_plugin.running.tiers import distinct
from moebius.hf_plugin.stats import CacheStats, LayerStats, Stats
from moebius.predictors.routing import PREDICTORS

if TYPE_CHECKING:
    from moebius.hf_plugin.running.runtime import ModelRuntime


def snapshot(runtime: ModelRuntime) -> Stats:
    """All counters as they are."""
    return Stats(
        runtime.options.device,
        runtime.options.cache_policy if runtime.tiers else "none",
        "none" if runtime.lookahead is None else runtime.options.predictor,
        sum({id(store.content): store.nbytes for store in runtime.stores}.values()),
        [_of_layer(runtime, index) for index in range(len(runtime.names))],
        [_of_cache(tier) for tier in distinct(runtime.tiers)],
        _notes(runtime),
    )


def learned(runtime: ModelRuntime) -> Profile:
    """What was learned of the routing so far.

    Raises:
        ValueError: there is no cache, or its policy keeps no statistics.
    """
    layers, caches = range(len(runtime.stores)), {index: tier.cache for index, tier in runtime.tiers.items()}
    if runtime.host is not None:
        caches = dict.fromkeys(layers, runtime.host.cache) | caches
    if len(caches) < len(layers):
        raise ValueError(
            "a model without a cache learns nothing of its routing; patch it with a device that has one, or record a "
            "profile with moebius trace --profile"
        )
    forecaster = None if runtime.lookahead is None else runtime.lookahead.forecaster
    habits = [] if forecaster is None else [forecaster.habits(index) for index in layers]
    return Profile([caches[index].use(index).astype("float32") for index in layers], habits)


def torch_code(runtime: ModelRuntime) -> list[str]:
    """Names of the layers whose experts no kernel computes."""
    return [name for name, store in zip(runtime.names, runtime.stores, strict=True) if store.spec.torch_code]


def _of_layer(runtime: ModelRuntime, index: int) -> LayerStats:
    values = asdict(runtime.counters[index])
    if runtime.lookahead is not None:
        values |= runtime.lookahead.layer_stats(index)
    if (tier := runtime.tiers.get(index)) is not None:
        counters = tier.cache.counters
        values |= {f.name: getattr(counters, f.name)[index].item() for f in fields(counters)}
    if runtime.host is not None:
        values |= runtime.host.stats(index)
    return LayerStats(**values)


def _of_cache(tier: Tier) -> CacheStats:
    cache = tier.cache
    return CacheStats(cache.device.name, len(cache.layers), cache.slots, cache.nbytes, tier.costs.to_dict())


def _notes(runtime: ModelRuntime) -> list[str]:
    tiers = distinct(runtime.tiers)
    layers = [layer for reference in runtime.layers if (layer := reference()) is not None]
    notes = [
        f"{name}: experts run as torch code, since their activation or norm has no kernel"
        for name in torch_code(runtime)
    ]
    notes += [
        f"{tier.cache.device.name}: out of memory {tier.shrunk} times, for which the cache shrank to "
        f"{tier.cache.nbytes / 2**30:.2f} GiB"
        for tier in tiers
        if tier.shrunk
    ]
    notes += [
        f"{device.name}: host memory of experts is not pinned ({device.refusal}), so that uploads take a detour "
        "through pinned buffers"
        for device in (tier.cache.device for tier in tiers)
        if device.refusal
    ]
    places = Counter(layer.held.note for layer in layers if layer.held.note)
    notes += [f"experts of {count} modules {note}" for note, count in places.items()]
    if runtime.lookahead is not None:
        notes += runtime.lookahead.notes()
    if runtime.lookahead is not None and PREDICTORS[runtime.options.predictor].gate:
        notes += [f"{layer.name}: {layer.gate.reason}" for layer in layers if layer.gate.reason]
    return notes
