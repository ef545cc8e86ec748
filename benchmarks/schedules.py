"""Finishing times of layers under several schedules, on recorded routing, and what deciding takes.

    python benchmarks/schedules.py [--trace TRACE.npz] [--out FILE.json]

A quarter of the experts is resident, chosen by the live cache's default policy, which sees one token after the other.
Decode steps are single tokens or the tokens of several sequences at once; prompts are runs of consecutive tokens. Costs
are those of three kinds of machines, not measured here; all schedules are judged by the same simulation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from moebius.gpu_cache.policy import Reason, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.tools.trace_file import read_trace
from moebius.kernels.routes import Routes
from moebius.predictors.costs import KNOTS, CostModel, ExpertCost

EXCERPT = Path(__file__).parents[1] / "tests" / "data" / "traces" / "gpt_oss_20b_excerpt.npz"
CAPACITY = 0.25
LAYERS = 200  # of each kind
BRUTE = 12  # experts up to which all splits are tried


class Machine(NamedTuple):
    """Bytes and operations per second of each part, for experts of 3 x 2880 x 2880 weights in bf16."""

    cpu_gbytes: float
    cpu_tflops: float
    gpu_gbytes: float
    gpu_tflops: float
    link_gbytes: float
    slowdown: float

    def costs(self, weights: int = 3 * 2880 * 2880) -> CostModel:
        def curve(gbytes: float, tflops: float) -> ExpertCost:
            return ExpertCost(np.maximum(weights * 2 / gbytes / 1e3, KNOTS * weights * 2 / tflops / 1e6))

        cpu, gpu = curve(self.cpu_gbytes, self.cpu_tflops), curve(self.gpu_gbytes, self.gpu_tflops)
        return CostModel(cpu, gpu, weights * 2 / self.link_gbytes / 1e3, self.slowdown)


MACHINES = {
    "server (16 cores, HBM, PCIe 5)": Machine(100, 1.5, 3500, 400, 50, 1.3),
    "desktop (DDR5, PCIe 4)": Machine(60, 1.0, 800, 80, 25, 1.3),
    "laptop (DDR5, small GPU, PCIe 4 x8)": Machine(60, 0.8, 200, 15, 12, 1.2),
}
KINDS = {
    "decode, 1 token": 1,
    "decode, 8 tokens": 8,
    "decode, 16 tokens": 16,
    "decode, 64 tokens": 64,
    "prompt, 512 tokens": 512,
}


class Layer(NamedTuple):
    """One layer step: tokens of each active expert, and whether it is resident."""

    tokens: np.ndarray
    resident: np.ndarray

    @property
    def routed(self) -> tuple[Routes, np.ndarray]:
        """The same as routes and slots."""
        experts, pairs = np.arange(len(self.tokens), dtype=np.int32), np.zeros(self.tokens.sum(), np.int32)
        offsets = np.concatenate([[0], np.cumsum(self.tokens)]).astype(np.int32)
        return Routes(experts, offsets, pairs, pairs.astype(np.float32)), self.resident.astype(np.int32) - 1


def hybrimoe(costs: CostModel, layer: Layer) -> np.ndarray:
    """The greedy schedule of HybriMoE (arXiv:2504.05897): bool [A], what the device computes.

    Three clocks. The device takes resident experts by falling load, then those that have arrived; the CPU absent ones
    by rising load, then light residents; the link moves the heaviest absent one. Who would end first commits.
    """
    cpu, gpu = costs.cpu.of(layer.tokens), costs.gpu.of(layer.tokens)
    by_load = np.argsort(layer.tokens, kind="stable").tolist()
    absent = [i for i in by_load if not layer.resident[i]]
    resident = [i for i in by_load if layer.resident[i]]
    arrived: list[tuple[float, int]] = []
    on_device = np.zeros(len(layer.tokens), bool)
    cpu_ends = gpu_ends = link_ends = 0.0
    while absent or resident or arrived:
        ends: dict[str, float] = {}
        if absent or resident:
            ends["cpu"] = cpu_ends + cpu[absent[0] if absent else resident[0]]
        if resident:
            ends["gpu"] = gpu_ends + gpu[resident[-1]]
        elif arrived:
            ends["gpu"] = max(gpu_ends, arrived[0][0]) + gpu[arrived[0][1]]
        if absent:
            ends["link"] = link_ends + costs.upload_us
        who = min(ends, key=lambda name: ends[name])
        if who == "cpu":
            (absent or resident).pop(0)
            cpu_ends = ends["cpu"]
        elif who == "link":
            arrived.append((ends["link"], moved := absent.pop()))
            on_device[moved] = True
            link_ends = ends["link"]
        else:
            on_device[resident.pop() if resident else arrived.pop(0)[1]] = True
            gpu_ends = ends["gpu"]
    return on_device


def ours(costs: CostModel, layer: Layer) -> np.ndarray:
    """bool [A], what the device computes."""
    return costs.assign(*layer.routed).on_device


SCHEDULES: dict[str, Callable[[CostModel, Layer], np.ndarray]] = {
    "moebius": ours,
    "hybrimoe": hybrimoe,
    "misses on the CPU": lambda _, layer: layer.resident,
    "misses fetched": lambda _, layer: np.ones(len(layer.tokens), bool),
}


def best(costs: CostModel, layer: Layer) -> float:
    """The finishing time of the best of all splits."""
    count = len(layer.tokens)
    ways = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    return min(costs.finish(*layer, way) for way in np.ascontiguousarray(ways, bool))


def layers_of(ids: np.ndarray, experts: int, rows: int) -> Iterator[Layer]:
    """Layer steps of `rows` tokens each: consecutive ones for a prompt, else one of each of several sequences."""
    tokens, layers, _ = ids.shape
    policy = make_policy("default", [experts] * layers)
    table = SlotTable([experts] * layers, int(experts * CAPACITY) * layers)
    steps = tokens // rows
    for step in range(steps):
        here = ids[step * rows : (step + 1) * rows] if rows >= 512 else ids[step::steps][:rows]
        for layer in range(layers):
            active, counts = np.unique(here[:, layer], return_counts=True)
            active = active.astype(np.int32)
            hit = table.lookup(layer, active) >= 0
            yield Layer(counts.astype(np.int64), hit)
            policy.used(layer, active, hit)
            missed = active[~hit]
            slots = policy.place(table, layer, missed, Reason.ADMIT) if len(missed) else missed
            table.reserve(layer, slots[slots >= 0], missed[slots >= 0])
            table.publish(slots[slots >= 0])


def measure(costs: CostModel, layers: list[Layer]) -> dict[str, Any]:
    """Mean finishing times in microseconds, the best possible where all splits can be tried, and deciding times."""
    found: dict[str, Any] = {}
    for name, schedule in SCHEDULES.items():
        found[name] = round(float(np.mean([costs.finish(*layer, schedule(costs, layer)) for layer in layers])), 1)
    if max(len(layer.tokens) for layer in layers) <= BRUTE:
        found["best"] = round(float(np.mean([best(costs, layer) for layer in layers])), 1)
    took = []
    for routed in [layer.routed for layer in layers] * 5:
        begun = perf_counter()
        costs.assign(*routed)
        took.append(perf_counter() - begun)
    median, late = np.percentile(took, [50, 95]) * 1e6
    found["decide_median_us"], found["decide_p95_us"] = round(float(median), 2), round(float(late), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=EXCERPT)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    trace = read_trace(given.trace)
    rows = []
    for kind, tokens in KINDS.items():
        steps = list(layers_of(trace.ids, trace.experts, tokens))
        chosen = [steps[i] for i in np.linspace(len(steps) // 4, len(steps) - 1, LAYERS).astype(int)]
        hit_rate = sum(int(layer.tokens[layer.resident].sum()) for layer in chosen) / sum(
            int(layer.tokens.sum()) for layer in chosen
        )
        for name, machine in MACHINES.items():
            row = {"kind": kind, "machine": name, "hit_rate": round(hit_rate, 3)} | measure(machine.costs(), chosen)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if given.out is not None:
        facts = {"trace": given.trace.name, "capacity": CAPACITY}
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
