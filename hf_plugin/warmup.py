"""Compile the CPU kernels before they are needed; they stay in the cache folder for later processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.policy import Reason, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.options import Options
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.formats import FLOATS
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes, select
from moebius.predictors.forecaster import Forecaster

_SIZE, _EXPERTS = 32, 2


class Compiled(NamedTuple):
    """Kernels of an expert format, or of the cache policy, and what the first call with them took."""

    kernels: str
    seconds: float


def warm_up(formats: Sequence[str], progress: Callable[[str, float], None]) -> Iterator[Compiled]:
    """Run a tiny layer in each format, at one token and at several, and a step of the cache policy.

    This compiles what is not in the cache folder yet.

    Args:
        progress: called as each step begins, with its name and the fraction done of the whole.
    """
    spec, steps = ExpertSpec(_SIZE, _SIZE), len(formats) + 1
    executor = CpuExecutor(2)  # one thread would need no crew
    try:
        for done, format in enumerate(formats):
            progress(format, done / steps)
            begun = perf_counter()
            store = ExpertStore.empty(spec, RecordLayout.of(spec, format), _EXPERTS)
            pack(store.layout, store.records, {n: torch.ones(_EXPERTS, *s) for n, s in store.layout.shapes().items()})
            for tokens in (1, 8):
                ids = np.zeros((tokens, 1), np.int64)
                routes = build_routes(ids, np.ones((tokens, 1), np.float32), _EXPERTS)
                x = torch.zeros(tokens, _SIZE, dtype=FLOATS.get(format, torch.float32))
                executor.run(store, x, routes, torch.zeros(tokens, _SIZE))
            yield Compiled(format, perf_counter() - begun)
        progress("cache", len(formats) / steps)
        begun = perf_counter()
        _use_policy()
        yield Compiled("cache", perf_counter() - begun)
    finally:
        executor.close()


def _use_policy() -> None:
    """One step of the default cache policy and of a predictor."""
    policy, experts = make_policy(Options().cache_policy, [_EXPERTS]), np.arange(1, dtype=np.int32)
    select(build_routes(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), _EXPERTS), np.ones(1, bool))
    policy.used(0, experts, np.zeros(1, bool))
    policy.place(SlotTable([_EXPERTS], 1), 0, experts, Reason.ADMIT)
    Forecaster([_EXPERTS], 1).advance(0, experts[None], None, None, 1.0, 1)
