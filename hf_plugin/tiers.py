"""The GPU side of a model: one cache for each device that its layers compute on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import CachedLayer, ExpertCache
from moebius.gpu_cache.device import full_name, open_device
from moebius.hf_plugin.calibration import calibrate
from moebius.hf_plugin.dispatcher import Tier
from moebius.hf_plugin.options import Options, parse_memory

# Left free on the device by gpu_memory="auto": room for the KV cache and activations of a few thousand tokens.
AUTO_RESERVE = 0.1  # of the free memory,
AUTO_RESERVE_BYTES = 1 << 30  # and this much


def open_tiers(
    options: Options, executor: CpuExecutor, stores: Sequence[ExpertStore], places: Sequence[torch.device]
) -> dict[int, Tier]:
    """Open the caches of a model and measure what experts cost there.

    Args:
        stores: experts of each layer.
        places: where each layer computes.

    Returns:
        The tier of each layer, by its number; layers on one device share one.

    Raises:
        ValueError: a budget is too small or exceeds its device.
        RuntimeError: there is no such device.
    """
    tiers: dict[int, Tier] = {}
    with ExitStack() as undo:
        for name, numbers in _by_device(options.device, places).items():
            tier = _open_tier(options, name, executor, stores, numbers)
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
    options: Options, name: str, executor: CpuExecutor, stores: Sequence[ExpertStore], numbers: Sequence[int]
) -> Tier:
    with ExitStack() as undo:
        device = open_device(name, options.emulated_link)
        undo.callback(device.close)
        layers = [
            CachedLayer(store.spec, store.layout, store.records) if number in numbers else None
            for number, store in enumerate(stores)
        ]
        size = budget(options, device.name, [stores[number] for number in numbers], device.free_memory())
        cache = ExpertCache(device, layers, size, options.cache_policy)
        undo.callback(cache.close)
        costs = calibrate(executor, cache, stores, device.torch_device)
        undo.pop_all()
    cache.counters.reset()
    cache.price = costs.price
    return Tier(cache, device.torch_device, costs)


def budget(options: Options, name: str, stores: Sequence[ExpertStore], free: int) -> int:
    """Bytes for the cache of these layers on the device `name`, of which `free` bytes are free.

    Raises:
        ValueError: there is no room for that, or for anything.
    """
    total = sum(store.nbytes for store in stores)
    wanted = parse_memory(options.gpu_memory, total)
    if wanted is None:
        wanted = min(total, int(free * (1 - AUTO_RESERVE)) - AUTO_RESERVE_BYTES)
        if wanted < max(store.layout.nbytes for store in stores):
            raise ValueError(
                f'gpu_memory="auto" finds no room for experts: {free / 2**30:.2f} GiB are free on {name} '
                "and about 1 GiB is left for the KV cache; give gpu_memory, or device='cpu'"
            )
    if min(wanted, total) > free:
        raise ValueError(
            f"gpu_memory={options.gpu_memory!r} asks for {min(wanted, total) / 2**30:.2f} GiB of experts, but "
            f"{free / 2**30:.2f} GiB are free on {name}; give less, or 'auto'"
        )
    return wanted
