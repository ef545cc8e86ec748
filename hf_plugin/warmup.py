"""Compile the CPU kernels before they are needed; they stay in the cache folder for later processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import FLOATS, ExpertSpec, RecordLayout
from moebius.kernels.routes import build_routes

_SIZE, _EXPERTS = 32, 2


class Compiled(NamedTuple):
    """One format's kernels, and what the first call with them took."""

    format: str
    seconds: float


def warm_up(formats: Sequence[str], progress: Callable[[str, float], None]) -> Iterator[Compiled]:
    """Run a tiny layer in each format, at one token and at several; compiles what is not in the cache yet."""
    spec = ExpertSpec(_SIZE, _SIZE)
    executor = CpuExecutor(1)
    try:
        for done, format in enumerate(formats):
            progress(format, done / len(formats))
            begun = perf_counter()
            store = ExpertStore.empty(spec, RecordLayout.of(spec, format), _EXPERTS)
            store.records.zero_()
            for tokens in (1, 8):
                ids = np.zeros((tokens, 1), np.int64)
                routes = build_routes(ids, np.ones((tokens, 1), np.float32), _EXPERTS)
                x = torch.zeros(tokens, _SIZE, dtype=FLOATS.get(format, torch.float32))
                executor.run(store, x, routes, torch.zeros(tokens, _SIZE))
            yield Compiled(format, perf_counter() - begun)
    finally:
        executor.close()
