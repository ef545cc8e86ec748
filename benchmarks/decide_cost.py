"""Microseconds per layer step of deciding: policy, admission and prediction as the dispatcher calls them.

    python benchmarks/decide_cost.py [--experts 128] [--top-k 8] [--layers 48] [--out FILE.json]

Routing is drawn from favourites that drift, a quarter of the experts is resident. Decisions are checked against replay.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from moebius.gpu_cache.policy import POLICIES, Reason, ValuedPolicy, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.tools.replay import run
from moebius.hf_plugin.tools.trace_file import Trace
from moebius.kernels.numba.replay import HITS
from moebius.predictors.forecaster import Forecaster, Hint
from moebius.predictors.routing import PREDICTORS

TOKENS = 200


def routing(layers: int, experts: int, top_k: int) -> np.ndarray:
    """Ids int32 [T, L, k] by weighted sampling without replacement."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(layers, experts)) * 2
    ids = np.empty((TOKENS, layers, top_k), np.int32)
    for token in ids:
        weights = 0.98 * weights + 0.4 * rng.normal(size=weights.shape)
        token[:] = np.argsort(-weights - rng.gumbel(size=weights.shape), axis=1)[:, :top_k]
    return ids


def time_policy(policy: ValuedPolicy, table: SlotTable, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Microseconds of `used` and of `place` in each layer step, float64 [steps, 2] (0 where nothing missed); hits."""
    took, hits = [], 0
    for token in ids:
        for layer, experts in enumerate(token):
            hit = table.lookup(layer, experts) >= 0
            hits += int(hit.sum())
            begun = perf_counter()
            policy.used(layer, experts, hit)
            middle = perf_counter()
            missed = experts[~hit]
            slots = policy.place(table, layer, missed, Reason.ADMIT) if len(missed) else missed
            took.append((middle - begun, perf_counter() - middle))
            if len(missed):
                table.reserve(layer, slots[slots >= 0], missed[slots >= 0].astype(np.int32))
                table.publish(slots[slots >= 0])
    return np.array(took) * 1e6, hits


def time_predictor(name: str, experts: int, ids: np.ndarray) -> np.ndarray:
    """Microseconds of `Forecaster.advance` in each layer step, and 0, float64 [steps, 2].

    That is everything but the router's own arithmetic: what it chose is here half right, by scores that say so.
    """
    layers, top_k = ids.shape[1:]
    forecaster = Forecaster([experts] * layers, top_k, ids=PREDICTORS[name].ids)
    rng, slots = np.random.default_rng(1), np.full(experts, -1, np.int32)
    slots[: experts // 4] = 0
    scores = rng.normal(size=(1, experts)).astype(np.float32)
    took = []
    for token in ids:
        for layer, used in enumerate(token):
            chosen = used.copy() if layer + 1 == layers else token[layer + 1].copy()
            chosen[::2] = rng.integers(experts, size=len(chosen[::2]))
            hint = Hint(scores, chosen[None]) if PREDICTORS[name].gate else None
            now = used[None]
            begun = perf_counter()
            forecaster.advance(layer, now, hint, slots if layer + 1 < layers else None, 0.5, 4)
            took.append((perf_counter() - begun, 0.0))
    return np.array(took) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    counts = [given.experts] * given.layers
    ids = routing(given.layers, given.experts, given.top_k)
    trace = Trace("drawn", ids, np.array([0, TOKENS]), [""], given.experts)
    found: list[dict[str, Any]] = []
    for name in POLICIES:
        took, hits = time_policy(make_policy(name, counts), SlotTable(counts, given.experts // 4 * given.layers), ids)
        assert hits == run(trace, 0.25, name)[0][:, HITS].sum(), f"{name} decides otherwise than in replay"
        found.append(_row(name, ("used", "place"), took))
    for name in ("next_gate", "ids", "blend"):
        found.append(_row(name, ("advance", "rest"), time_predictor(name, given.experts, ids)))
    total = sum(row["total_median_us"] for row in found if row["name"] in ("default", "blend"))
    found.append({"name": "default + blend", "total_median_us": round(total, 2)})
    for row in found:
        print(row)
    if given.out is not None:
        facts = {name: getattr(given, name) for name in ("experts", "top_k", "layers")}
        given.out.write_text(json.dumps(facts | {"load": os.getloadavg()[0], "rows": found}, indent=1) + "\n")


def _row(name: str, parts: tuple[str, str], took: np.ndarray) -> dict[str, Any]:
    steady = took[len(took) // 4 :]
    columns = {f"{part}_median_us": round(float(np.median(steady[:, i])), 2) for i, part in enumerate(parts)}
    total = steady.sum(1)
    return {"name": name, **columns, "total_median_us": round(float(np.median(total)), 2),
            "total_p80_us": round(float(np.percentile(total, 80)), 2)}  # fmt: skip


if __name__ == "__main__":
    main()
