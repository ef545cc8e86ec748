"""All policies, with and without prediction, on one recorded trace and on variants of it; rows go to a JSON file.

    python benchmarks/replay_study.py TRACE.npz --tuned-on physics,history,computer --out benchmarks/results/FILE.json

The groups that something was tuned on and all others are reported apart, each from an empty cache that knows nothing.
Variants change the number of experts and of ranks: pairs of layers merged into one of twice the experts, the first
ranks only, every third token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from moebius.gpu_cache.policy import POLICIES
from moebius.hf_plugin.tools.replay import judge, run
from moebius.hf_plugin.tools.trace_file import Trace, read_trace
from moebius.predictors.forecaster import Forecaster

CAPACITIES, PRICES = (0.25, 0.5), (0.25, 1.0, 3.0)


def parts(trace: Trace, tuned_on: set[str]) -> dict[str, Trace]:
    tuned = np.array([group in tuned_on for group in trace.groups])
    return {"tuned": trace.only(np.flatnonzero(tuned)), "others": trace.only(np.flatnonzero(~tuned))}


def variants(trace: Trace) -> dict[str, Trace]:
    even = trace.layers // 2 * 2
    merged = np.concatenate([trace.ids[:, 0:even:2], trace.ids[:, 1:even:2] + trace.experts], 2)
    half = trace.top_k // 2
    sixes = np.concatenate([merged[..., : half + 1], merged[..., trace.top_k : trace.top_k + half + 1]], 2)

    def made(ids: np.ndarray, experts: int) -> Trace:
        return Trace(trace.name, np.ascontiguousarray(ids), np.array([0, len(ids)]), [""], experts)

    return {
        "merged": made(merged, 2 * trace.experts),
        "merged, fewer ranks": made(sixes, 2 * trace.experts),
        "first ranks": made(trace.ids[..., :half], trace.experts),
        "first rank": made(trace.ids[..., :1], trace.experts),
        "every third token": made(trace.ids[::3], trace.experts),
    }


def rows(label: str, trace: Trace, policies: list[str], predictor: str, cold: bool = False) -> Iterator[dict[str, Any]]:
    for capacity in CAPACITIES:
        for price in PRICES:
            result = judge(trace, capacity, policies, predictor, price, cold)
            facts = {"part": label, "capacity": capacity, "upload_cost": price, "cold": cold, "tokens": trace.tokens}
            yield from (facts | asdict(row) for row in result.rows)
            yield facts | {"policy": "bound", "predictor": predictor} | asdict(result.bound)
            print(
                label, capacity, price, predictor, *(f"{row.policy} {row.cost:.4f}" for row in result.rows), flush=True
            )


def foresight(learned: Trace, judged: Trace, ahead: int) -> dict[str, Any]:
    """How right the ids forecaster is on `judged` after `learned`, and on what LRU at 25 % does not hold."""
    both = replace(judged, ids=np.concatenate([learned.ids, judged.ids]))
    hits = run(both, 0.25, "lru", outcome=True)[1][learned.tokens :].astype(bool)
    forecaster = Forecaster([both.experts] * both.layers, both.top_k, ahead, rows=1)
    count, right, sure, sure_right = 0, 0, 0, 0
    bins = np.zeros((20, 3))
    recent = np.zeros((both.layers, both.experts))
    slots = both.experts // 4
    for number, token in enumerate(both.ids):
        for layer in range(both.layers):
            forecaster.observe(layer, token[layer : layer + 1])
            chances = forecaster.forecast(layer) if number >= learned.tokens else None
            if chances is not None:
                target = layer + ahead
                used = np.zeros(both.experts, bool)
                used[token[target]] = True
                absent = np.ones(both.experts, bool)
                absent[np.argsort(-recent[target])[:slots]] = False
                likely = absent & (chances >= 0.75)
                right += int(used[np.argsort(-chances)[: both.top_k]].sum())
                count += both.top_k
                sure += int(likely.sum())
                sure_right += int((likely & used).sum())
                index = np.minimum((chances * 20).astype(int), 19)
                bins += np.stack([np.bincount(index, w, 20) for w in (np.ones(len(used)), chances, used)], 1)
            recent[layer, token[layer]] = number + 1
    misses = int((~hits[:, ahead:]).sum())
    return {
        "ahead": ahead,
        "recall_at_k": right / count,
        "precision_absent_at_75": sure_right / sure,
        "misses_covered": sure_right / misses,
        "calibration_error": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tuned-on", required=True, help="groups, with commas between")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    trace = read_trace(given.trace)
    tuned_on = set(given.tuned_on.split(","))
    divided = parts(trace, tuned_on)
    names = list(POLICIES)
    found: list[dict[str, Any]] = []
    for label, part in {"all": trace, **divided}.items():
        found += rows(label, part, names, "none")
    found += rows("others", divided["others"], ["lru", "default"], "ids")
    found += rows("others", divided["others"], ["lru", "ema_table", "default"], "none", cold=True)
    for label, part in variants(divided["others"]).items():
        found += rows(label, part, names, "none")
    forecasts = [foresight(divided["tuned"], divided["others"], ahead) for ahead in (1, 2, 3)]
    for forecast in forecasts:
        print(forecast, flush=True)
    document = {
        "trace": trace.name,
        "tuned_on": sorted(tuned_on),
        "tokens": {label: part.tokens for label, part in divided.items()},
        "rows": found,
        "ids_forecaster": {"learned_on": "tuned", "judged_on": "others", "rows": forecasts},
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
