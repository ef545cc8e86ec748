"""Measure what an expert costs on this machine: on the CPU, on the device, and to bring there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import ExpertCache
from moebius.kernels.routes import Routes
from moebius.predictors.costs import CostModel, ExpertCost

FEW, MANY = 1, 32  # tokens of an expert in decode, and in a short prompt
EXPERTS = 4
REPEATS = 3
BUDGET_S = 1.5  # the whole measurement stays below two seconds; compiling kernels on their first use is not counted


def calibrate(
    executor: CpuExecutor, cache: ExpertCache, stores: Sequence[ExpertStore], device: torch.device
) -> CostModel:
    """Time the experts of the cache's first layer, which stand for all of them, and refine while running.

    The experts fetched for this stay in the cache, as a first guess as good as any.
    """
    layer = cache.layers[0]
    store = stores[layer]
    deadline = perf_counter() + BUDGET_S
    experts = np.arange(min(EXPERTS, store.num_experts, cache.slots), dtype=np.int32)
    upload_us = _uploads(cache, layer, experts)
    cpu = _cost(deadline, lambda tokens: _cpu(executor, store, experts, tokens))
    slots = cache.lookup(layer, experts)
    try:
        ready = slots >= 0
        gpu = replace(cpu)
        if ready.any():
            there = experts[ready], slots[ready]
            gpu = _cost(deadline, lambda tokens: _gpu(cache, layer, store, *there, tokens, device))
    finally:
        cache.finish(layer)
    return CostModel(cpu, gpu, upload_us)


def _cost(deadline: float, run: Callable[[int], float]) -> ExpertCost:
    few, many = (_repeat(deadline, partial(run, tokens)) for tokens in (FEW, MANY))
    return ExpertCost.fit(FEW, few, MANY, many)


def _repeat(deadline: float, run: Callable[[], float]) -> float:
    """Median of several runs after one that warms up; fewer past the deadline."""
    run()
    times = [run()]
    while len(times) < REPEATS and perf_counter() < deadline:
        times.append(run())
    return median(times)


def _routes(experts: np.ndarray, tokens: int) -> Routes:
    offsets = np.arange(len(experts) + 1, dtype=np.int32) * tokens
    pairs = np.tile(np.arange(tokens, dtype=np.int32), len(experts))
    return Routes(experts, offsets, pairs, np.ones(len(pairs), np.float32))


def _cpu(executor: CpuExecutor, store: ExpertStore, experts: np.ndarray, tokens: int) -> float:
    x = torch.zeros(tokens, store.spec.hidden, dtype=store.layout.dtype)
    out = torch.zeros(tokens, store.spec.hidden)
    begun = perf_counter()
    executor.run(store, x, _routes(experts, tokens), out)
    return (perf_counter() - begun) * 1e6 / len(experts)


def _gpu(
    cache: ExpertCache,
    layer: int,
    store: ExpertStore,
    experts: np.ndarray,
    slots: np.ndarray,
    tokens: int,
    device: torch.device,
) -> float:
    x = torch.zeros(tokens, store.spec.hidden, dtype=store.layout.dtype, device=device)
    begun = perf_counter()
    launch = cache.launch(layer, x, _routes(experts, tokens), slots)
    launch.result()
    launch.completion.wait()
    return (perf_counter() - begun) * 1e6 / len(experts)


def _uploads(cache: ExpertCache, layer: int, experts: np.ndarray) -> float:
    """Microseconds of a copy, by the device's own clock: policies compile when they are first asked for a slot."""
    cache.fetch(layer, experts)
    cache.drain()
    cache.finish(layer)
    return median(cache.copy_times())
