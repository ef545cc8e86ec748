"""Microseconds that the host spends on a layer of a patched model beside computing experts.

    python -m benchmarks.host_work [--rows 1,4,16] [--calls 2000] [--out FILE.json]

Layers look to the host like those of Qwen3-30B-A3B (H = 2048, 128 experts, top-8, bf16), but nothing computes and
nothing is copied: the jobs of the CPU's threads and the launches and copies of the device are over when they are handed
over. What is left is dispatch: routing tables, look-up, split, launch, the CPU's job, merge, policy, admission,
forecast. `device` is an accelerator over a driver whose calls do nothing, so that what those cost is not in here.

*cpu* has no cache; *hits* has all experts in it; *misses* three quarters, and one of every eight routed experts is
absent, to be admitted or not as the policy decides; *foresight* is the same while the next layer is foreseen. `empty`
is a module that returns zeros. Medians over calls that go through the layers in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch as replaced

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moebius
from moebius.cpu_experts import crew
from moebius.cpu_experts.executor import CpuExecutor
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.hf_plugin.running import dispatcher, tiers
from moebius.hf_plugin.running.layer import ATTRIBUTE, PatchedLayer
from moebius.hf_plugin.running.lookahead import Lookahead
from moebius.hf_plugin.tools.record import write_record
from moebius.predictors.costs import CostModel, ExpertCost
from moebius.predictors.switch import Switch

EXPERTS, TOP_K, HIDDEN, LAYERS = 128, 8, 2048, 8
WARMUP = 300
CASES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "hits": {"device": "emulated", "gpu_memory": 1.0, "prefetch": False},
    "misses": {"device": "emulated", "gpu_memory": 0.75, "prefetch": False},
    "foresight": {"device": "emulated", "gpu_memory": 0.75},
}
# What is timed one by one, in the order in which a step calls it; inner parts are in their outer ones too.
PARTS: list[tuple[Any, str]] = [
    (Lookahead, "ask"),
    (dispatcher, "_cross"),
    (dispatcher, "sort_routes"),
    (LayerCache, "lookup"),
    (CostModel, "assign"),
    (dispatcher, "DeviceShare"),
    (LayerCache, "launch"),
    (Lookahead, "foresee"),
    (LayerCache, "prefetch"),
    (LayerCache, "used"),
    (dispatcher, "_on_cpu_meanwhile"),
    (CpuExecutor, "run"),
    (dispatcher, "_merge"),
    (LayerCache, "finish"),
    (LayerCache, "admit"),
    (dispatcher.Tier, "observe_copies"),
]


class IdleEvent:
    """Reached as soon as it is recorded."""

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: object) -> float:
        return 0.2  # milliseconds


class IdleStream:
    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class IdleDriver(Driver):
    """Does nothing, at once."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._stream, self._nothing = IdleStream(), nullcontext()

    def stream(self, priority: int = 0) -> Any:
        return self._stream

    def current_stream(self) -> Any:
        return self._stream

    def on(self, stream: Any) -> Any:
        return self._nothing

    def on_device(self) -> Any:
        return self._nothing

    def event(self) -> Any:
        return IdleEvent()

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def is_pinned(self, host: torch.Tensor) -> bool:
        return True

    def synchronize(self) -> None: ...

    def trim(self) -> None: ...

    def free_memory(self) -> int:
        return 1 << 34


def idle_executor(*_: Any) -> Callable[..., torch.Tensor]:
    """A launch whose result is there, and zero."""
    results: dict[torch.Size, torch.Tensor] = {}

    def execute(memory: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
        if x.shape not in results:
            results[x.shape] = torch.zeros(x.shape)
        return results[x.shape]

    return execute


@contextmanager
def idle_machine() -> Iterator[None]:
    """Nothing computes and nothing is copied within the block."""
    with ExitStack() as stack:
        for target, name, stand_in in (
            (tiers, "open_device", lambda *_: AcceleratorDevice(IdleDriver())),
            (tiers, "calibrate", lambda *_: machine_costs()),
            ("moebius.gpu_cache.cache", "make_executor", idle_executor),
            (crew.shared, "run", lambda *_: None),
        ):
            owner = sys.modules[target] if isinstance(target, str) else target
            stack.enter_context(replaced.object(owner, name, stand_in))
        yield


def machine_costs() -> CostModel:
    """Of a server: 100 GB/s on the CPU, 3.5 TB/s on the device, 50 GB/s over the link."""
    return CostModel(ExpertCost.line(95.0, 10.0), ExpertCost.line(2.7, 0.1), 190.0, 1.2)


class Case:
    """One patched model and the calls of its layers."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows = name, rows
        sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32}
        config = Qwen3MoeConfig(moe_intermediate_size=8, num_hidden_layers=LAYERS, **sizes, **heads)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.model = moebius.patch(model, cpu_threads=1, **CASES[name])
        self.modules = [module for module in self.model.modules() if ATTRIBUTE in module.__dict__]
        self.layers: list[PatchedLayer] = [module.__dict__[ATTRIBUTE] for module in self.modules]
        self.rng = np.random.default_rng(rows)
        self._step(np.stack([self.rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)]), 0)  # opens the caches
        runtime = self.layers[0].runtime
        for tier in tiers.distinct(runtime.tiers):
            tier.cache.fill([np.ones(EXPERTS)] * LAYERS if name == "hits" else self._spread())

    def _spread(self) -> list[np.ndarray]:
        return [self.rng.random(EXPERTS) for _ in range(LAYERS)]

    def _ids(self, layer: int) -> np.ndarray:
        """Experts of each row: one of them absent and the others resident; where there are none such, all at random."""
        tier = self.layers[0].runtime.tiers.get(layer)
        slots = np.zeros(EXPERTS) if tier is None else tier.cache.layer(layer).slots()
        there, absent = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        if not len(absent) or len(there) < TOP_K:
            return np.stack([self.rng.permutation(EXPERTS)[:TOP_K] for _ in range(self.rows)])
        rows = [[*self.rng.permutation(there)[: TOP_K - 1], self.rng.choice(absent)] for _ in range(self.rows)]
        return np.array(rows)

    def _step(self, ids: np.ndarray, layer: int) -> float:
        """Microseconds of one call."""
        x = torch.randn(self.rows, HIDDEN, dtype=torch.bfloat16)
        weights = torch.rand(self.rows, TOP_K, dtype=torch.bfloat16) + 0.1
        routed = torch.from_numpy(ids)
        for tier in self.layers[0].runtime.tiers.values():  # what was measured meanwhile means nothing
            tier.costs.cpu.curve[:], tier.costs.upload_us = machine_costs().cpu.curve, machine_costs().upload_us
        module = self.modules[layer]
        begun = perf_counter()
        module(x, routed, weights)
        return (perf_counter() - begun) * 1e6

    def token(self) -> list[float]:
        """Microseconds of each layer's call."""
        with torch.inference_mode():
            return [self._step(self._ids(layer), layer) for layer in range(LAYERS)]


@contextmanager
def traced(found: dict[str, list[float]]) -> Iterator[None]:
    """Time every call of `PARTS` within the block."""

    def timing(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        begun = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            found[name].append((perf_counter() - begun) * 1e6)

    with ExitStack() as stack:
        for owner, name in PARTS:
            former = getattr(owner, name)
            wrapped = partial(timing, name.lstrip("_"), former)
            stand_in = (lambda call: lambda *args, **kwargs: call(*args, **kwargs))(wrapped)  # binds like a function
            stack.enter_context(replaced.object(owner, name, stand_in))
        yield


def measure(name: str, rows: int, calls: int) -> dict[str, Any]:
    """Microseconds of a call, and of its parts in calls of their own, which the clock makes longer."""
    with idle_machine(), replaced.object(Switch, "_refusal", lambda *_: None):
        case = Case(name, rows)
        for _ in range(WARMUP // LAYERS):
            case.token()
        took = [one for _ in range(calls // LAYERS) for one in case.token()]
        parts: dict[str, list[float]] = defaultdict(list)
        with traced(parts):
            for _ in range(calls // LAYERS):
                case.token()
        steps = calls // LAYERS * LAYERS
        stats = moebius.stats(case.model).sums
        moebius.unpatch(case.model)
    median, late = np.percentile(took, [50, 90])
    shares = {part: round(float(np.median(times)) * len(times) / steps, 1) for part, times in parts.items()}
    misses = stats.misses / max(stats.hits + stats.misses, 1)
    facts = {"case": name, "rows": rows, "us": round(float(median), 1), "p90_us": round(float(late), 1)}
    return facts | {"miss_rate": round(misses, 3), "uploads": stats.uploads, "parts_us": shares}


def empty(rows: int, calls: int) -> float:
    """Microseconds of a module whose forward returns zeros."""

    class Empty(torch.nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    module, x = Empty(), torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    took = []
    with torch.inference_mode():
        for _ in range(calls):
            begun = perf_counter()
            module(x, x, x)
            took.append(perf_counter() - begun)
    return float(np.median(took)) * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16", help="tokens of a call, with commas between")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for rows in map(int, given.rows.split(",")):
        for name in given.cases.split(","):
            row = measure(name, rows, given.calls) | {"empty_us": round(empty(rows, given.calls), 1)}
            found.append(row)
            print(json.dumps(row), flush=True)
    if given.out is not None:
        shape = {"experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "layers": LAYERS}
        write_record(given.out, [Path(__file__).name, *sys.argv[1:]], shape | {"calls": given.calls}, found)


if __name__ == "__main__":
    main()
