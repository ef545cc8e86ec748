"""Compile CPU kernels and tune GPU kernels before they are needed; the cache folder keeps both for later processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moebius.cpu_experts import linear
from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.policy import Reason, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.discovery.sites import find_sites
from moebius.hf_plugin.options import Options
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.formats import FLOATS
from moebius.kernels.numba.slots import scatter
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes, select
from moebius.predictors.costs import CostModel, ExpertCost
from moebius.predictors.forecaster import Forecaster

_SIZE, _EXPERTS = 32, 2


class Compiled(NamedTuple):
    """Kernels of an expert format, or of the cache policy, and what the first call with them took."""

    kernels: str
    seconds: float


def warm_up(formats: Sequence[str], progress: Callable[[str, float], None]) -> Iterator[Compiled]:
    """Run a tiny layer in each format, at one token and at several, a dense one, and a step of the cache policy.

    This compiles what is not in the cache folder yet.

    Args:
        progress: called as each step begins, with its name and the fraction done of the whole.
    """
    spec, steps = ExpertSpec(_SIZE, _SIZE), len(formats) + 2
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
            store.weights(0)  # as experts are checked, and given back
            yield Compiled(format, perf_counter() - begun)
        progress("dense layers", len(formats) / steps)
        begun = perf_counter()
        for dtype in FLOATS.values():
            linear.multiply(torch.zeros(1, _SIZE, dtype=dtype), torch.zeros(_SIZE, _SIZE, dtype=dtype), None)
        yield Compiled("dense layers", perf_counter() - begun)
        progress("cache", (len(formats) + 1) / steps)
        begun = perf_counter()
        _use_policy()
        yield Compiled("cache", perf_counter() - begun)
    finally:
        executor.close()


class Tuned(NamedTuple):
    """The fastest tile of a kind of layers and calls, and its time in microseconds."""

    kernels: str
    tile: dict[str, int]
    us: float


def tune_tiles(config: PreTrainedConfig, format: str, device: torch.device) -> Iterator[Tuned]:
    """Tune the Triton kernels for a model's experts where they are not tuned yet.

    Args:
        device: an accelerator.

    Raises:
        ValueError: the model has no experts that can be taken over.
    """
    from moebius.kernels.triton.choice import device_name  # here, because Triton may not be installed
    from moebius.kernels.triton.tuning import device_timer, tune

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for spec in (site.spec for site in find_sites(model, loaded=False)):
        if not spec.torch_code:
            layout = RecordLayout.of(spec, format)
            timer_for = device_timer(spec, layout, device)
            for kind, found in tune(spec, layout, device_name(device), timer_for):
                yield Tuned(kind.label, found[0].tile._asdict(), found[0].us)


def _use_policy() -> None:
    """One step of the default cache policy, of a predictor, and of the split between processors."""
    policy, experts = make_policy(Options().cache_policy, [_EXPERTS]), np.arange(1, dtype=np.int32)
    select(build_routes(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), _EXPERTS), np.ones(1, bool))
    policy.used(0, experts, np.zeros(1, bool))
    table, slots = SlotTable([_EXPERTS], 1), np.zeros(1, np.int32)
    policy.place(table, 0, experts, Reason.ADMIT)
    table.pin(slots)
    table.unpin(slots)
    table.claim(0, experts)
    table.any_there(0, experts)
    table.release(slots)
    table.reserve(0, slots, experts)
    table.publish(slots)
    scatter(1, np.zeros(1, np.int32), slots)
    Forecaster([_EXPERTS], 1).advance(0, experts[None], None, None, 1.0, 1)
    costs, tokens = CostModel(ExpertCost.line(1.0, 1.0), ExpertCost.line(1.0, 1.0), 1.0), np.ones(1, np.int64)
    routes = build_routes(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)
    costs.assign(routes, np.zeros(1, np.int32))
    costs.cpu.of(tokens)
    costs.observe_cpu(tokens, 1.0, 0.0)
