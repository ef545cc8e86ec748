"""Measure what an expert costs on this machine: on the CPU, on the device, and to bring there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import median
from time import perf_counter

import numpy as np
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.kernels.routes import Routes
from moebius.predictors.costs import CostModel, ExpertCost, slowdown

TOKENS = (1, 8, 64, 256)  # of an expert, from decode to a prompt
FEW = 8  # up to here several experts are timed in one call, as they come in decode
EXPERTS = 4
REPEATS = 3
BUDGET_S = 0.75  # for each processor: the whole stays below two seconds, without the kernels that it compiles

# The emulated device computes on this CPU and copies within its memory, so that its own times say nothing about the
# device that it stands for. An expert there is taken to cost this share of what it costs on the CPU, and a copy, where
# no speed of the link is given, as much as so many calls of the CPU with one expert each.
EMULATED_SHARE = 1 / 8
EMULATED_CALLS = 2.0


def calibrate(
    executor: CpuExecutor, cache: ExpertCache, stores: Sequence[ExpertStore], device: torch.device, dtype: torch.dtype
) -> CostModel:
    """Time the experts of the cache's first layer, which stand for all of them, and refine while running.

    The experts fetched for this stay in the cache, as a first guess as good as any.

    Args:
        dtype: of the model's hidden states; with others, coded experts run other kernels, without tensor cores.
    """
    layer = cache.layers[0]
    return _Calibration(executor, cache, cache.layer(layer), stores[layer], device, dtype).run()


@dataclass(slots=True)
class _Calibration:
    executor: CpuExecutor
    cache: ExpertCache
    layer: LayerCache
    store: ExpertStore
    device: torch.device
    dtype: torch.dtype

    def run(self) -> CostModel:
        there = min(self.store.num_experts, self.cache.slots)
        experts, more = np.split(np.arange(min(2 * EXPERTS, there), dtype=np.int32), [EXPERTS])
        upload_us = median(self.uploads(experts))
        cpu = _curve(self.on_cpu, experts)
        gpu = self.of_device(experts, cpu)
        slower = 1.0
        if len(more):
            upload_us, slower = self.together(experts, more, upload_us, cpu)
        if self.device.type == "cpu":
            gpu = cpu.scaled(EMULATED_SHARE)
        if not self.cache.device.real_link:
            upload_us, slower = EMULATED_CALLS * cpu.call(np.ones(1, np.int64)), 1.0
        return CostModel(cpu, gpu, upload_us, slower)

    def of_device(self, experts: np.ndarray, otherwise: ExpertCost) -> ExpertCost:
        """The cost of experts on the device; `otherwise` where they could not all be brought there."""
        slots = self.layer.lookup(experts)
        try:
            if (slots < 0).any():
                return otherwise
            return _curve(partial(self.on_device, slots), experts)
        finally:
            self.layer.finish()

    def on_cpu(self, experts: np.ndarray, tokens: int) -> float:
        """Microseconds of one call with these experts, each on so many tokens."""
        x = torch.zeros(tokens, self.store.spec.hidden, dtype=self.dtype, device="cpu")
        out = torch.zeros(tokens, self.store.spec.hidden, dtype=torch.float32, device="cpu")
        begun = perf_counter()
        self.executor.run(self.store, x, _routes(experts, tokens), out)
        return (perf_counter() - begun) * 1e6

    def on_device(self, slots: np.ndarray, experts: np.ndarray, tokens: int) -> float:
        """The same on the device, where expert e is in ``slots[e]``."""
        x = torch.zeros(tokens, self.store.spec.hidden, dtype=self.dtype, device=self.device)
        begun = perf_counter()
        launch = self.layer.launch(x, _routes(experts, tokens), slots[experts])
        launch.result()
        launch.completion.wait()
        return (perf_counter() - begun) * 1e6

    def uploads(self, experts: np.ndarray, meanwhile: Callable[[], object] = lambda: None) -> list[float]:
        """Microseconds of copies, by the device's own clock: policies compile when they are first asked for a slot."""
        self.layer.fetch(experts)
        meanwhile()
        self.cache.drain()
        self.layer.finish()
        return self.cache.copy_times()

    def together(
        self, computed: np.ndarray, copied: np.ndarray, upload_us: float, cpu: ExpertCost
    ) -> tuple[float, float]:
        """Microseconds of a copy beside the CPU's work, and how much slower that is meanwhile."""
        alone_us = cpu.call(np.ones(len(computed), np.int64))
        calls = min(ceil(len(copied) * upload_us / alone_us), 100)
        took: list[float] = []
        times = self.uploads(copied, lambda: took.extend(self.on_cpu(computed, 1) for _ in range(calls)))
        return median(times), slowdown(alone_us * calls, sum(took), sum(times))


@dataclass(slots=True)
class _Timer:
    """Times calls as long as there is time left; a first call counts as the second, since kernels compile in it."""

    left_s: float = BUDGET_S

    def median_us(self, run: Callable[[], float]) -> float:
        """Median of several runs (microseconds) after one that warms up; of one where no time is left."""
        run()
        times = [run()]
        self.left_s -= 2 * times[0] / 1e6
        while len(times) < REPEATS and self.left_s > 0:
            times.append(run())
            self.left_s -= times[-1] / 1e6
        return median(times)


def _curve(run: Callable[[np.ndarray, int], float], experts: np.ndarray) -> ExpertCost:
    """An expert's cost by tokens: two points at least, and more while there is time."""
    timer = _Timer()
    single, together = (timer.median_us(partial(run, some, 1)) for some in (experts[:1], experts))
    start = max(len(experts) * single - together, 0.0) / max(len(experts) - 1, 1)
    start = min(start, single / 2)  # experts so small that the difference is noise
    found = [(together - start) / len(experts)]
    for tokens in TOKENS[1:]:
        if len(found) > 1 and timer.left_s <= 0:
            break
        some = experts if tokens <= FEW else experts[:1]
        found.append((timer.median_us(partial(run, some, tokens)) - start) / len(some))
    return ExpertCost.measured(TOKENS[: len(found)], found, start)


def _routes(experts: np.ndarray, tokens: int) -> Routes:
    offsets = np.arange(len(experts) + 1, dtype=np.int32) * tokens
    pairs = np.tile(np.arange(tokens, dtype=np.int32), len(experts))
    return Routes(experts, offsets, pairs, np.ones(len(pairs), np.float32))
