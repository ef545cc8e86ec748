"""What the patched layers of one model share: threads, cache, predictor, cost model, counters, and their lifetime."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.record_file import RecordFile
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import out_of_memory
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.profile import Profile, read_profile
from moebius.hf_plugin.running.defaults import default_threads
from moebius.hf_plugin.running.dispatcher import Tier, run_layer
from moebius.hf_plugin.running.host_tier import HostTier, open_host
from moebius.hf_plugin.running.lookahead import Lookahead
from moebius.hf_plugin.running.reserve import Reserve
from moebius.hf_plugin.running.snapshot import learned, snapshot, torch_code
from moebius.hf_plugin.running.tiers import budget, distinct, fitting, open_tiers, shrink
from moebius.hf_plugin.running.timeline import Timeline
from moebius.hf_plugin.stats import LayerStats, Stats
from moebius.hf_plugin.tools.recording import Recorder
from moebius.kernels.routes import Routes
from moebius.predictors.routing import PREDICTORS, Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.hf_plugin.running.layer import PatchedLayer


logger = logging.getLogger(__name__)


class ModelRuntime:
    """Resources of one patched model. One lock serialises its layers' calls, from whatever threads they come.

    Args:
        options: as given to `patch`, with `device` resolved (not "auto").
        layers: the patched layers in order.
        reserve: device memory that the model needs besides its weights.
        file: what holds their experts, if memory does not.
    """

    def __init__(
        self, options: Options, layers: Sequence[PatchedLayer], reserve: Reserve, file: RecordFile | None = None
    ) -> None:
        self.options, self.reserve, self.file = options, reserve, file
        self.lock = threading.RLock()
        self.stores: list[ExpertStore] = [layer.store for layer in layers]
        self.layers: list[ref[PatchedLayer]] = [ref(layer) for layer in layers]
        self.profile: Profile | None = None if options.profile is None else read_profile(options.profile)
        self._start([layer.name for layer in layers])
        if slow := torch_code(self):
            logger.warning(
                "experts of %d modules (%s, ...) run as torch code, slower than kernels, since there is no kernel for "
                "their activation or norm", len(slow), slow[0]
            )  # fmt: skip

    def _start(self, names: Sequence[str]) -> None:
        _runtimes.add(self)
        self.names = list(names)
        self._patched = len(names)
        threads = self.options.cpu_threads or default_threads()
        self.executor = CpuExecutor(threads, beside_torch=self.options.device == "cpu")
        self.tiers: dict[int, Tier] = {}  # of each layer; layers on one device share one
        self.host: HostTier | None = open_host(self.options, self.file, self.stores, self.executor)
        if self.host is not None and self.profile is not None:
            self.host.cache.start_from(self.profile.uses)
        self.recorder: Recorder | None = None
        self.timeline: Timeline | None = None
        self.moved = False  # whether patching moved the rest of the model to the device
        self._stale = self.options.device != "cpu"  # whether the cache must be opened before it is used
        self.lookahead: Lookahead | None = self._lookahead()
        self.reset_stats()

    def _lookahead(self) -> Lookahead | None:
        nothing_to_bring = self.options.device == "cpu" and self.host is None
        if nothing_to_bring or not self.options.prefetch or self.options.predictor == "none":
            return None
        # the list, which `adopt` changes in place, and not the runtime: no cycle
        gates = [partial(_gate_of, self.layers, index) for index in range(len(self.layers))]
        experts = [store.num_experts for store in self.stores]
        habits = self.profile.habits if self.profile is not None else []
        return Lookahead(PREDICTORS[self.options.predictor], experts, gates, self.host, habits)

    # ---- lifetime

    def open(self) -> None:
        """Open the caches, if this model has any, and measure what experts cost here.

        Raises:
            ValueError: the budget is too small or exceeds the device.
            RuntimeError: there is no such device.
        """
        if self.options.device != "cpu":
            self.tiers = open_tiers(
                self.options, self.executor, self.stores, self._places(), self._dtype(), self.reserve
            )
            if self.profile is not None:
                for tier in distinct(self.tiers):
                    tier.cache.start_from(self.profile.uses)
                    tier.cache.fill(self.profile.uses)
                    tier.cache.counters.reset()
            self._stale = False

    def _places(self) -> list[torch.device]:
        return [torch.device("cpu") if (layer := ref()) is None else layer.device for ref in self.layers]

    def _dtype(self) -> torch.dtype:
        """Of the hidden states."""
        alive = (layer.held.dtype for ref in self.layers if (layer := ref()) is not None)
        return next(alive, torch.float32)

    def close(self) -> None:
        """Give back slots, threads and pinned memory. Idempotent."""
        with self.lock, ExitStack() as steps:  # all are taken, whatever a device raises
            steps.callback(self.executor.close)
            if self.host is not None:
                steps.callback(self.host.close)
            self._close_tiers()

    def _close_tiers(self) -> None:
        tiers, self.tiers = self.tiers, {}
        with ExitStack() as steps:
            for tier in distinct(tiers):
                steps.callback(tier.cache.close)

    def release(self, layer: PatchedLayer) -> None:
        """A layer was unpatched; after the last one everything is given back."""
        self._patched -= 1
        if not self._patched:
            self.close()

    def forked(self) -> None:
        """In the child of a fork: threads, and who held the lock, are the parent's; caches are opened anew."""
        self.lock = threading.RLock()
        _abandoned.append(self.tiers)
        for tier in distinct(self.tiers):
            tier.cache.abandon()
        self.tiers, self._stale = {}, self.options.device != "cpu"

    def replace_store(self, index: int, store: ExpertStore) -> None:
        """Layer `index` has other records now; the cache is opened anew before its next use."""
        with self.lock:
            self.stores[index] = store
            self._forget_tiers()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRuntime:
        """The runtime of a copied model: own threads and cache, filled by the copied layers through `adopt`."""
        new = object.__new__(ModelRuntime)
        memo[id(self)] = new
        new.options, new.reserve, new.file, new.lock = self.options, self.reserve, self.file, threading.RLock()
        new.stores, new.layers, new.profile = list(self.stores), list(self.layers), self.profile
        new._start(self.names)
        new._patched = 0
        return new

    def adopt(self, layer: PatchedLayer) -> None:
        """Take in the copy of one of the original's layers."""
        self.layers[layer.index], self.stores[layer.index] = ref(layer), layer.store
        self._patched += 1

    # ---- work

    def on_cpu(
        self,
        layer: PatchedLayer,
        x: torch.Tensor,
        routes: Routes,
        out: torch.Tensor,
        meanwhile: Callable[[], None],
    ) -> None:
        """As `CpuExecutor.run` for a layer's experts, wherever they are kept; `meanwhile` is called while they come."""
        if self.host is None:
            meanwhile()
            self.executor.run(layer.store, x, routes, out)
        else:
            self.host.run(layer.index, x, routes, out, meanwhile)

    def run(self, layer: PatchedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One call of a layer; see `dispatcher.run_layer`."""
        with self.lock:
            if not torch.is_grad_enabled():
                return self._run(layer, x, ids, weights)
            with torch.no_grad():
                return self._run(layer, x, ids, weights)

    def _run(self, layer: PatchedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layer.store.check_unchanged()
        if self._stale:
            self.open()
        return run_layer(self, layer, x.detach() if x.requires_grad else x, ids, weights)

    def resize(self, gpu_memory: int | float | str) -> None:
        """Change the cache's budget; the cache starts empty."""
        with self.lock:
            if self.options.device == "cpu":
                raise ValueError("a model on device='cpu' has no cache to resize; patch it with a device that has one")
            former, self.options = self.options, replace(self.options, gpu_memory=gpu_memory)
            try:
                self._resize()
            except BaseException as error:
                self.options = former
                if out_of_memory(error):
                    self._forget_tiers()
                raise

    def _resize(self) -> None:
        if self._stale:
            self.open()
            return
        sizes = [(tier.cache, self._budget(tier.cache)) for tier in distinct(self.tiers)]
        for cache, size in sizes:
            fitting(cache.device.name, size, cache.least_bytes, cache.resize)

    def _forget_tiers(self) -> None:
        """Close the caches; they are opened anew before their next use."""
        self._close_tiers()
        self._stale = self.options.device != "cpu"

    def _budget(self, cache: ExpertCache) -> int:
        served, free = [self.stores[number] for number in cache.layers], cache.free_memory() + cache.nbytes
        return budget(self.options, cache.device.name, served, len(self.stores), free, self.reserve)

    def shrink(self) -> bool:
        """Some device ran out of memory: make the cache smaller where least is free. False if none can be."""
        with self.lock:
            tiers = sorted(distinct(self.tiers), key=lambda tier: tier.cache.free_memory())
            try:
                return any(shrink(tier) for tier in tiers)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._forget_tiers()  # no room even for the least
                return False

    def profile_now(self) -> Profile:
        """What was learned of the routing so far.

        Raises:
            ValueError: there is no cache, or its policy keeps no statistics.
        """
        with self.lock:
            return learned(self)

    # ---- statistics

    def reset_stats(self) -> None:
        """All counters to zero."""
        with self.lock:
            self.counters = [LayerStats(name) for name in self.names]
            if self.host is not None:
                self.host.reset_stats()
            if self.lookahead is not None:
                self.lookahead.reset_stats()
            for tier in distinct(self.tiers):
                tier.launches.clear()
                tier.cache.counters.reset()

    def stats(self) -> Stats:
        """A snapshot of all counters."""
        with self.lock:
            for tier in distinct(self.tiers):
                self.count_launches(tier)
            return snapshot(self)

    def count_launches(self, tier: Tier) -> None:
        """Add the device time of the launches that have ended, and refine the cost of experts there."""
        while tier.launches and tier.launches[0].completion.done():  # they end in order
            ran = tier.launches.popleft()
            took_us = ran.completion.elapsed_us()
            self.counters[ran.layer].gpu_ms += took_us / 1e3
            tier.observe_launch(ran, took_us)


_runtimes: WeakSet[ModelRuntime] = WeakSet()
_abandoned: list[dict[int, Tier]] = []  # caches of a parent process, which the child must neither use nor close


def _after_fork() -> None:
    for runtime in list(_runtimes):
        runtime.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _gate_of(layers: list[ref[PatchedLayer]], index: int) -> Gate | None:
    layer = layers[index]()
    return None if layer is None else layer.gate()
