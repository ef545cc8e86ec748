"""The GPU side of a model: one cache for each device that its layers compute on, as large as there is room."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import CachedLayer, ExpertCache
from moebius.gpu_cache.device import full_name, open_device, out_of_memory
from moebius.hf_plugin.options import Options, parse_memory
from moebius.hf_plugin.running.calibration import calibrate
from moebius.hf_plugin.running.dispatcher import Tier
from moebius.hf_plugin.running.reserve import Reserve

logger = logging.getLogger(__name__)
Opened = TypeVar("Opened")


def open_tiers(
    options: Options,
    executor: CpuExecutor,
    stores: Sequence[ExpertStore],
    places: Sequence[torch.device],
    dtype: torch.dtype,
    reserve: Reserve,
) -> dict[int, Tier]:
    """Open the caches of a model and measure what experts cost there.

    Args:
        stores: experts of each layer.
        places: where each layer computes.
        dtype: of the hidden states.
        reserve: what gpu_memory="auto" leaves free.

    Returns:
        The tier of each layer, by its number; layers on one device share one.

    Raises:
        ValueError: a budget is too small or exceeds its device.
        RuntimeError: there is no such device.
    """
    tiers: dict[int, Tier] = {}
    with ExitStack() as undo:
        for name, numbers in _by_device(options.device, places).items():
            tier = _open_tier(options, name, executor, stores, numbers, dtype, reserve)
            undo.callback(tier.cache.close)
            tiers |= dict.fromkeys(numbers, tier)
        undo.pop_all()
    return tiers


def distinct(tiers: dict[int, Tier]) -> list[Tier]:
    """Each tier once."""
    return list({id(tier): tier for tier in tiers.values()}.values())


def _by_device(wanted: str, places: Sequence[torch.device]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        groups.setdefault(_cache_device(wanted, place), []).append(number)
    return groups


def _cache_device(wanted: str, place: torch.device) -> str:
    """A layer on an accelerator has its cache there, unless the option names another by its number."""
    return str(place) if place.type == wanted else full_name(wanted)


def _open_tier(
    options: Options,
    name: str,
    executor: CpuExecutor,
    stores: Sequence[ExpertStore],
    numbers: Sequence[int],
    dtype: torch.dtype,
    reserve: Reserve,
) -> Tier:
    served = [stores[number] for number in numbers]
    layers = [
        CachedLayer(store.spec, store.layout, store.records) if number in numbers else None
        for number, store in enumerate(stores)
    ]

    device = open_device(name, options.emulated_link)

    def attempt(size: int) -> Tier:
        with ExitStack() as undo:
            cache = ExpertCache(device, layers, size, options.cache_policy)
            undo.callback(cache.close)
            costs = calibrate(executor, cache, stores, device.torch_device, dtype)
            undo.pop_all()
        return Tier(cache, device.torch_device, costs)

    with ExitStack() as undo:
        undo.callback(device.close)
        size = budget(options, device.name, served, len(stores), device.free_memory(), reserve)
        tier = fitting(device.name, size, sum({store.layout.nbytes for store in served}), attempt)
        undo.pop_all()
    tier.cache.counters.reset()
    tier.cache.price = tier.costs.price
    return tier


def budget(options: Options, name: str, served: Sequence[ExpertStore], layers: int, free: int, reserve: Reserve) -> int:
    """Bytes for a cache on the device `name`.

    Args:
        served: experts of the layers that it serves.
        layers: how many the model has.
        free: bytes that are free on the device.
        reserve: what "auto" leaves free.

    Raises:
        ValueError: there is no room for that, or for anything.
    """
    total = sum(store.nbytes for store in served)
    wanted = parse_memory(options.gpu_memory, total)
    if wanted is None:
        left = reserve.on_device(len(served) / layers, free)
        wanted = min(total, free - left)
        if wanted < max(store.layout.nbytes for store in served):
            raise ValueError(
                f'gpu_memory="auto" finds no room for experts: {free / 2**30:.2f} GiB are free on {name}, and '
                f"{left / 2**30:.2f} GiB of them are left for the KV cache and activations of {reserve.tokens} tokens; "
                "give gpu_memory, or device='cpu'"
            )
    if min(wanted, total) > free:
        raise ValueError(
            f"gpu_memory={options.gpu_memory!r} asks for {min(wanted, total) / 2**30:.2f} GiB of experts, but "
            f"{free / 2**30:.2f} GiB are free on {name}; give less, or 'auto'"
        )
    return wanted


def fitting(name: str, size: int, least: int, attempt: Callable[[int], Opened]) -> Opened:
    """The result of ``attempt(size)``, with a quarter less each time that the device `name` runs out of memory.

    Raises:
        RuntimeError: there is no room for `least` bytes either; the last error, for which `out_of_memory` is true.
    """
    while True:
        try:
            return attempt(size)
        except RuntimeError as error:
            if size <= least or not out_of_memory(error):
                raise
        size = max(least, size - size // 4)
        logger.warning("%s is out of memory: the expert cache shrinks to %.2f GiB", name, size / 2**30)


def shrink(tier: Tier) -> bool:
    """Give a quarter of the cache's memory back, whose experts are forgotten; False if it has the least it can have."""
    cache, name = tier.cache, tier.cache.device.name
    if cache.nbytes <= cache.least_bytes:
        return False
    size = max(cache.least_bytes, cache.nbytes - cache.nbytes // 4)
    logger.warning("%s is out of memory: the expert cache shrinks to %.2f GiB", name, size / 2**30)
    fitting(name, size, cache.least_bytes, cache.resize)
    tier.shrunk += 1
    return True
