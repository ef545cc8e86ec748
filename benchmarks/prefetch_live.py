"""Live prefetching on the small trained model: how right each predictor is, and what prefetching does to the time.

    python benchmarks/prefetch_live.py [--links none,0.1] [--disk 0.5,0.25] --out FILE.json

*Predictors* look at the same held-out text, token by token, without ever resting. *Times* are of `generate` with and
without prefetching, in turn, by one model whose predictor is taken away and given back; a ratio is that of a pair of
runs on the same prompt. `--links` emulates a device behind a link of so many GB/s. `--disk` keeps that share of the
experts in memory and the others in a file, which is read past the page cache; the experts are made wide with zeros, by
which no text and no routing changes. "rests" says why the predictor prefetches nothing, by the measured costs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch as replaced

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moebius
from moebius.hf_plugin.checkpoints.converting import convert
from moebius.hf_plugin.patching import runtimes
from moebius.hf_plugin.tools.generation import require_model
from moebius.predictors.routing import PREDICTORS
from moebius.predictors.switch import Switch

CAPACITY = 0.25
PROMPT, WARMUP = 64, 4  # tokens; rounds before the first that counts
WIDTH = 4096  # of experts in a file, by which one takes 3 MB
COUNTED = ("prefetch_issued", "prefetch_used", "ram_misses", "disk_reads", "read_ahead", "read_ahead_used", "stall_ms")
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


def times(model: PreTrainedModel, rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds of pairs of runs with and without prefetching, and what happened in them."""
    [runtime], prompts = runtimes(model), text().squeeze(0).split(PROMPT)
    lookahead, took = runtime.lookahead, {True: [], False: []}
    counted = {on: dict.fromkeys(COUNTED, 0.0) for on in took}
    for number in range(-WARMUP, rounds):
        prompt = prompts[number % (len(prompts) - 1)][None]
        for on in (True, False) if number % 2 else (False, True):
            runtime.lookahead = lookahead if on else None
            moebius.reset_stats(model)
            begun = perf_counter()
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            if number >= 0:
                took[on].append(perf_counter() - begun)
                sums = moebius.stats(model).sums
                counted[on] = {name: counted[on][name] + getattr(sums, name) for name in COUNTED}
    runtime.lookahead = lookahead
    stats = moebius.stats(model)
    return compared(took) | {
        "counted": {name: [round(counted[on][name]) for on in (True, False)] for name in COUNTED},
        "costs": {key: round(value, 2) for key, value in stats.costs.items() if isinstance(value, float)},
        "rests": [note for note in stats.notes if "prefetching rests" in note],
    }


def compared(took: dict[bool, list[float]]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(took[True], took[False], strict=True))
    half, near = len(ratios) // 2, round(math.sqrt(len(ratios)))  # 95 % of medians are within so many ranks
    return {
        "ratio_median": round(median(ratios), 4),
        "ratio_median_between": [
            round(ratios[max(half - near, 0)], 4),
            round(ratios[min(half + near, -1 % len(ratios))], 4),
        ],
        "ratio_p20_p80": [round(ratios[len(ratios) // 5], 4), round(ratios[-1 - len(ratios) // 5], 4)],
        "ms_with": round(median(took[True]) * 1e3, 1),
        "ms_without": round(median(took[False]) * 1e3, 1),
    }


def on_a_link(link: float | None) -> PreTrainedModel:
    return moebius.patch(load(), device="emulated", gpu_memory=CAPACITY, emulated_link=link)


def widened(folder: Path) -> Path:
    """The model with experts of `WIDTH`, what is new in them all zeros, converted to a file of records."""
    model = AutoModelForCausalLM.from_pretrained(require_model(None))
    more = WIDTH - model.config.moe_intermediate_size
    for layer in model.model.layers:
        experts = layer.mlp.experts
        gate_and_up = [pad(part, (0, 0, 0, more)) for part in experts.gate_up_proj.data.chunk(2, 1)]
        experts.gate_up_proj.data, experts.down_proj.data = (
            torch.cat(gate_and_up, 1),
            pad(experts.down_proj.data, (0, more)),
        )
    model.config.moe_intermediate_size = WIDTH
    model.save_pretrained(folder / "stock")
    return convert(folder / "stock", folder / "converted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="", help="GB/s, with commas between; none for as fast as memory")
    parser.add_argument("--disk", default="", help="shares of the experts in memory, with commas between")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--forecast-tokens", type=int, default=0, help="of text for each predictor; 0 for no comparison"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        found[part] = rows
        if given.out is not None:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    def timed(facts: dict[str, Any], make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        model = make()
        row = facts | {"tokens": given.tokens, "rounds": given.rounds} | times(model, given.rounds, given.tokens)
        moebius.unpatch(model)
        print(row, flush=True)
        return row

    if given.forecast_tokens:
        keep("predictors", list(predictors(given.forecast_tokens)))
    if given.links:
        links = [None if link == "none" else float(link) for link in given.links.split(",")]
        keep("links", [timed({"link_gbytes_per_s": link}, partial(on_a_link, link)) for link in links])
    if given.disk:
        with tempfile.TemporaryDirectory() as folder:
            loaded = partial(moebius.from_pretrained, widened(Path(folder)), device="cpu")
            shares = [float(share) for share in given.disk.split(",")]
            keep("disk", [timed({"in_memory": share}, partial(loaded, cpu_memory=share)) for share in shares])


if __name__ == "__main__":
    main()
