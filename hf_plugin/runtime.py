"""What the patched layers of one model share: threads, cache, predictor, cost model, counters, and their lifetime."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import psutil
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import CachedLayer, ExpertCache
from moebius.gpu_cache.device import default_device, open_device
from moebius.hf_plugin.calibration import calibrate
from moebius.hf_plugin.dispatcher import Tier, run_layer
from moebius.hf_plugin.options import Options, parse_memory
from moebius.hf_plugin.recording import Recorder
from moebius.hf_plugin.stats import LayerStats, Stats
from moebius.predictors.routing import Accuracy, Gate, NextGate, NoPrediction, RoutingPredictor

if TYPE_CHECKING:
    from moebius.hf_plugin.layer import PatchedLayer

# Left free on the device by gpu_memory="auto": room for the KV cache and activations of a few thousand tokens.
AUTO_RESERVE = 0.1  # of the free memory,
AUTO_RESERVE_BYTES = 1 << 30  # and this much


class ModelRuntime:
    """Resources of one patched model. One lock serialises its layers' calls, from whatever threads they come.

    Args:
        options: as given to `patch`, with `device` resolved (not "auto").
        layers: the patched layers in order.
    """

    def __init__(self, options: Options, layers: Sequence[PatchedLayer]) -> None:
        self.options = options
        self.lock = threading.RLock()
        self.stores: list[ExpertStore] = [layer.store for layer in layers]
        self.layers: list[ref[PatchedLayer]] = [ref(layer) for layer in layers]
        self._start([layer.name for layer in layers])

    def _start(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._patched = len(names)
        self.executor = CpuExecutor(self.options.cpu_threads or default_threads())
        self.tier: Tier | None = None
        self.recorder: Recorder | None = None
        self.moved = False  # whether patching moved the rest of the model to the device
        self._stale = self.options.device != "cpu"  # whether the cache must be opened before it is used
        self.predictor: RoutingPredictor = self._predictor()
        self.reset_stats()

    def _predictor(self) -> RoutingPredictor:
        if self.options.device == "cpu" or not self.options.prefetch or self.options.predictor == "none":
            return NoPrediction()
        # the list, which `adopt` changes in place, and not the runtime: no cycle
        return NextGate([partial(_gate_of, self.layers, index) for index in range(len(self.layers))])

    # ---- lifetime

    def open(self) -> None:
        """Open the cache, if this model has one, and measure what experts cost here.

        Raises:
            ValueError: the budget is too small or exceeds the device.
            RuntimeError: there is no such device.
        """
        if self.options.device == "cpu":
            return
        with ExitStack() as undo:
            device = open_device(self.options.device, self.options.emulated_link)
            undo.callback(device.close)
            layers = [CachedLayer(store.spec, store.layout, store.records) for store in self.stores]
            cache = ExpertCache(device, layers, self._budget(device.free_memory()), self.options.cache_policy)
            undo.callback(cache.close)
            costs = calibrate(self.executor, cache, self.stores, device.torch_device)
            undo.pop_all()
        cache.counters.reset()
        cache.price = costs.price
        self.tier, self._stale = Tier(cache, device.torch_device, costs), False

    def _budget(self, free: int) -> int:
        total = sum(store.nbytes for store in self.stores)
        wanted = parse_memory(self.options.gpu_memory, total)
        if wanted is None:
            wanted = min(total, int(free * (1 - AUTO_RESERVE)) - AUTO_RESERVE_BYTES)
            if wanted < max(store.layout.nbytes for store in self.stores):
                raise ValueError(
                    f'gpu_memory="auto" finds no room for experts: {free / 2**30:.2f} GiB are free on '
                    f"{self.options.device} and about 1 GiB is left for the KV cache; give gpu_memory, or device='cpu'"
                )
        if min(wanted, total) > free:
            raise ValueError(
                f"gpu_memory={self.options.gpu_memory!r} asks for {min(wanted, total) / 2**30:.2f} GiB of experts, but "
                f"{free / 2**30:.2f} GiB are free on {self.options.device}; give less, or 'auto'"
            )
        return wanted

    def close(self) -> None:
        """Give back slots, threads and pinned memory. Idempotent."""
        with self.lock:
            self._close_tier()
            self.executor.close()

    def _close_tier(self) -> None:
        tier, self.tier = self.tier, None
        if tier is not None:
            tier.cache.close()

    def release(self, layer: PatchedLayer) -> None:
        """A layer was unpatched; after the last one everything is given back."""
        self._patched -= 1
        if not self._patched:
            self.close()

    def replace_store(self, index: int, store: ExpertStore) -> None:
        """Layer `index` has other records now; the cache is opened anew before its next use."""
        with self.lock:
            self.stores[index] = store
            self._close_tier()
            self._stale = self.options.device != "cpu"

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRuntime:
        """The runtime of a copied model: own threads and cache, filled by the copied layers through `adopt`."""
        new = object.__new__(ModelRuntime)
        memo[id(self)] = new
        new.options, new.lock = self.options, threading.RLock()
        new.stores, new.layers = list(self.stores), list(self.layers)
        new._start(self._names)
        new._patched = 0
        return new

    def adopt(self, layer: PatchedLayer) -> None:
        """Take in the copy of one of the original's layers."""
        self.layers[layer.index], self.stores[layer.index] = ref(layer), layer.store
        self._patched += 1

    # ---- work

    def run(self, layer: PatchedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One call of a layer; see `dispatcher.run_layer`."""
        with self.lock, torch.no_grad():
            if self._stale:
                self.open()
            return run_layer(self, layer, x.detach(), ids, weights)

    def resize(self, gpu_memory: int | float | str) -> None:
        """Change the cache's budget; the cache starts empty."""
        with self.lock:
            if self.options.device == "cpu":
                raise ValueError("a model on device='cpu' has no cache to resize; patch it with a device that has one")
            former, self.options = self.options, replace(self.options, gpu_memory=gpu_memory)
            try:
                if self.tier is None:
                    self.open()
                else:
                    cache = self.tier.cache
                    cache.resize(self._budget(cache.free_memory() + cache.nbytes))
            except BaseException:
                self.options = former
                raise

    # ---- statistics

    def reset_stats(self) -> None:
        """All counters to zero."""
        with self.lock:
            self.counters = [LayerStats(name) for name in self._names]
            self.accuracy = [Accuracy() for _ in self._names]
            if self.tier is not None:
                self.tier.launches.clear()
                self.tier.cache.counters.reset()

    def stats(self) -> Stats:
        """A snapshot of all counters."""
        with self.lock:
            for index in range(len(self._names)):
                self.count_launch(index)
            cache = None if self.tier is None else self.tier.cache
            return Stats(
                self.options.device,
                self.options.cache_policy if cache else "none",
                "none" if isinstance(self.predictor, NoPrediction) else self.options.predictor,
                cache.slots if cache else 0,
                cache.nbytes if cache else 0,
                sum({s.records.data_ptr(): s.nbytes for s in self.stores}.values()),
                [self._layer_stats(i) for i in range(len(self._names))],
                self._notes(),
                {} if self.tier is None else self.tier.costs.to_dict(),
            )

    def _layer_stats(self, index: int) -> LayerStats:
        values = asdict(self.counters[index])
        accuracy = self.accuracy[index]
        values |= {
            "predicted": accuracy.predicted,
            "predicted_right": accuracy.right,
            "predicted_of": accuracy.used,
            "predicted_absent": accuracy.absent,
            "predicted_absent_right": accuracy.absent_right,
        }
        if self.tier is not None:
            counters = self.tier.cache.counters
            values |= {f.name: getattr(counters, f.name)[index].item() for f in fields(counters)}
        return LayerStats(**values)

    def _notes(self) -> list[str]:
        layers = [layer for reference in self.layers if (layer := reference()) is not None]
        notes = [
            f"{layer.name}: experts run as torch code, since their activation or norm has no kernel"
            for layer in layers
            if layer.store.spec.torch_code
        ]
        if not isinstance(self.predictor, NoPrediction):
            notes += [f"{layer.name}: {layer.gate.reason}" for layer in layers if layer.gate.reason]
        return notes

    def count_launch(self, index: int) -> None:
        """Add the device time of the layer's last launch, once it is known, and refine the cost of experts there."""
        tier = self.tier
        if tier is None or index not in tier.launches:
            return
        launch, tokens = tier.launches[index]
        if (took := launch.elapsed_ms()) is not None:
            self.counters[index].gpu_ms += took
            tier.costs.gpu.observe(tokens, took * 1e3)
            del tier.launches[index]


def _gate_of(layers: list[ref[PatchedLayer]], index: int) -> Gate | None:
    layer = layers[index]()
    return None if layer is None else layer.gate()


def default_threads() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def resolve_device(name: str) -> str:
    """The device that "auto" means here; others are returned as they are."""
    return default_device() if name == "auto" else name
