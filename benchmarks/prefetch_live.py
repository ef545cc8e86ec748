"""Live prefetching on the small trained model: how right each predictor is, and what prefetching does to the time.

    python benchmarks/prefetch_live.py [--links none,0.1] [--rounds 12] [--tokens 32] --out benchmarks/results/X.json

*Predictors* look at the same held-out text, token by token, without ever resting. *Times* are of `generate` with and
without prefetching, in turn, after two rounds of warming up, of several pairs of models; the ratio is the median over
rounds of one to the other.
"rests" says why the predictor prefetches nothing, by the measured costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch as replaced

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moebius
from moebius.hf_plugin.tools.generation import require_model
from moebius.predictors.routing import PREDICTORS
from moebius.predictors.switch import Switch

CAPACITY = 0.25
INSTANCES = 4  # pairs of models: two that are the same differ by up to 5 % for as long as they live
SHOWN = ("recall", "precision_absent", "calibration_error", "prefetch_issued", "prefetch_used", "hit_rate")


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(require_model(None), dtype=torch.float32).eval()


def text() -> torch.Tensor:
    folder = Path(require_model(None))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: torch.Tensor = tokenizer((folder / "held_out_excerpt.txt").read_text(), return_tensors="pt")["input_ids"]
    return ids


def predictors(tokens: int) -> Iterator[dict[str, Any]]:
    ids = text()[:, : 2 * tokens]
    for name in PREDICTORS:
        if name == "none":
            continue
        model = moebius.patch(load(), device="emulated", gpu_memory=CAPACITY, predictor=name)
        with torch.no_grad(), replaced.object(Switch, "_refusal", lambda *args: None):
            past = None
            for position in range(ids.shape[1]):
                if position == tokens:
                    moebius.reset_stats(model)
                past = model(ids[:, position : position + 1], past_key_values=past, use_cache=True).past_key_values
        stats = moebius.stats(model).to_dict()
        row = {"predictor": name, "tokens": tokens} | {key: round(stats[key], 4) for key in SHOWN}
        print(row, flush=True)
        yield row
        moebius.unpatch(model)


def times(link: float | None, rounds: int, tokens: int) -> dict[str, Any]:
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(INSTANCES):
        stats = compare(link, rounds, tokens, took)
    ratios = sorted(a / b for a, b in zip(took[True], took[False], strict=True))
    row = {
        "link_gbytes_per_s": link,
        "ratio_median": round(median(ratios), 4),
        "ratio_p20": round(ratios[len(ratios) // 5], 4),
        "ratio_p80": round(ratios[-1 - len(ratios) // 5], 4),
        "ratio_of_instances": [
            round(
                median(a / b for a, b in zip(took[True][i : i + rounds], took[False][i : i + rounds], strict=True)), 4
            )
            for i in range(0, len(ratios), rounds)
        ],
        "ms_with": round(median(took[True]) * 1e3, 1),
        "ms_without": round(median(took[False]) * 1e3, 1),
        "prefetch_issued": stats.sums.prefetch_issued,
        "prefetch_used": stats.sums.prefetch_used,
        "costs": {key: round(value, 2) for key, value in stats.costs.items() if isinstance(value, float)},
        "rests": [note for note in stats.notes if "prefetching rests" in note],
    }
    print(row, flush=True)
    return row


def compare(link: float | None, rounds: int, tokens: int, took: dict[bool, list[float]]) -> moebius.Stats:
    """Add the seconds of `rounds` generates of two fresh models to `took`; the statistics of the one that foresees."""
    prompt = text()[:, :64]
    models = {
        on: moebius.patch(load(), device="emulated", gpu_memory=CAPACITY, prefetch=on, emulated_link=link)
        for on in (True, False)
    }
    for number in range(-2, rounds):
        for on in (True, False) if number % 2 else (False, True):
            begun = perf_counter()
            models[on].generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            if number >= 0:
                took[on].append(perf_counter() - begun)
    stats = moebius.stats(models[True])
    for model in models.values():
        moebius.unpatch(model)
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="none,1,0.1", help="GB/s, with commas between")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--forecast-tokens", type=int, default=0, help="of text for each predictor; 0 for no comparison"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    links = [None if link == "none" else float(link) for link in given.links.split(",") if link]
    found = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}
    if given.forecast_tokens:
        found["predictors"] = list(predictors(given.forecast_tokens))
    found.setdefault("times", [])
    found["times"] += [times(link, given.rounds, given.tokens) for link in links]
    found["settings"] = {"capacity": CAPACITY, "rounds": given.rounds, "tokens": given.tokens, "instances": INSTANCES}
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
