"""`moebius bench generate`: time to first token, decode speed and memory of whole models, stock and patched.

One model is loaded and patched and unpatched in turn: every round visits every variant, so that a change of the
machine's speed meets all of them. After each patch a few untimed tokens are generated (kernels compile, caches fill).
All variants continue the same prompt greedily, and their tokens are compared with stock's.

A variant is a name of `VARIANTS`, with an expert format after a colon where it is not to be the model's own:
``stock,moebius,moebius:int4``. Such variants keep the original experts in host memory beside their own.
"""

from __future__ import annotations

import gc
import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moebius
from moebius.gpu_cache.device import default_device
from moebius.hf_plugin.running.timeline import Slice, write_trace
from moebius.hf_plugin.tools.generation import Agreement, Generation, compare_with_stock, generate_greedily
from moebius.hf_plugin.tools.overlap import Overlap, traced
from moebius.kernels.formats import FLOATS, FORMATS

VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "moebius": {"device": "auto"},
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated"},
    "cuda": {"device": "cuda"},
}
WARMUP_TOKENS = 8
METHOD = "one model, patched and unpatched in turn"


@dataclass(frozen=True, slots=True)
class Row:
    """One variant; times and speeds are medians over the rounds, memory is the largest of them.

    ``expert_format`` is what the experts' weights are stored in, for stock the name of its dtype.
    ``p20`` and ``p80`` are percentiles of the decode speed (tokens/s) over the single steps of all rounds.
    ``peak_rss_bytes`` is the process's while generating. Where `same_tokens` is false, `first_difference` is the first
    position that differs from stock's text and `stock_margin` the distance of stock's two best logits there.
    """

    variant: str
    expert_format: str
    ttft_s: float
    decode_tok_s: float
    p20: float
    p80: float
    peak_rss_bytes: int
    peak_gpu_bytes: int
    same_tokens: bool
    first_difference: int | None
    stock_margin: float | None
    rounds: int
    hits: int | None
    misses: int | None
    uploads: int | None
    overlap: Overlap | None


@dataclass(slots=True)
class _Runs:
    """What the rounds of one variant gave."""

    generations: list[Generation] = field(default_factory=list)
    rss: int = 0
    gpu: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    overlap: Overlap | None = None


def run(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    variants: list[str],
    new_tokens: int,
    rounds: int,
    options: dict[str, Any],
    progress: Callable[[str, float], None] = lambda _step, _done: None,
    trace: Path | None = None,
) -> list[Row]:
    """Measure the variants in turn.

    Args:
        model: unpatched; so it is again at the end.
        prompt: int64 [1, P].
        variants: of `VARIANTS`, some with ``:<format>`` behind.
        new_tokens: tokens after the prompt, at least 2.
        options: of `moebius.patch`, for every patched variant; `expert_format` for those that name none.
        progress: called with a step's name and the fraction done of the whole.
        trace: file for a Chrome trace of one more generation of each patched variant, for which `overlap` stands too.

    Raises:
        ValueError: an unknown variant or format, or too few tokens or rounds.
    """
    check_settings(variants, new_tokens, rounds)
    progress("stock, for comparison", 0.0)
    expected = generate_greedily(model, prompt, new_tokens).tokens
    runs = {name: _Runs() for name in variants}
    for turn in range(rounds):
        for i, name in enumerate(variants):
            progress(f"round {turn + 1} of {rounds}, {name}", (turn * len(variants) + i) / (rounds * len(variants)))
            with _variant(model, name, options):
                _one_round(model, prompt, new_tokens, runs[name])
                if trace is not None and turn == rounds - 1 and moebius.is_patched(model):
                    runs[name].slices, runs[name].overlap = traced(model, prompt, new_tokens)
    if trace is not None:
        write_trace(trace, {name: done.slices for name, done in runs.items() if done.slices})
    return [_row(name, _format_of(name, model, options), model, prompt, expected, runs[name]) for name in variants]


def check_settings(variants: list[str], new_tokens: int, rounds: int) -> None:
    """Refuse what cannot be measured, before a model is loaded."""
    if not variants:
        raise ValueError(f"no variants are given; choose of {', '.join(VARIANTS)}")
    for name in variants:
        _settings_of(name, {})
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"{new_tokens} new tokens and {rounds} rounds give no decode speed; use 2 and 1 or more")


def _settings_of(variant: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Options of `moebius.patch` for a variant, None for stock."""
    name, colon, format = variant.partition(":")
    if name not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; choose of {', '.join(VARIANTS)}, or <variant>:<format>")
    own = VARIANTS[name]
    if colon and (own is None or format not in FORMATS):
        raise ValueError(
            f"variant {variant!r} has no such expert format; put one of {', '.join(FORMATS)} behind a patched variant"
        )
    if own is None:
        return None
    chosen = {**options, **own} | ({"expert_format": format} if colon else {})
    return chosen | {"keep_original": chosen.get("expert_format", "native") != "native"}


@contextmanager
def _variant(model: PreTrainedModel, name: str, options: dict[str, Any]) -> Iterator[None]:
    """The model patched as the variant says, for the length of the block."""
    settings = _settings_of(name, options)
    if settings is None:
        yield
        return
    moebius.patch(model, **settings)
    try:
        yield
    finally:
        moebius.unpatch(model)


def _format_of(variant: str, model: PreTrainedModel, options: dict[str, Any]) -> str:
    chosen = (_settings_of(variant, options) or {}).get("expert_format", "native")
    names = {dtype: format for format, dtype in FLOATS.items()}
    return names.get(model.dtype, str(model.dtype).removeprefix("torch.")) if chosen == "native" else chosen


def _one_round(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, runs: _Runs) -> None:
    generate_greedily(model, prompt, min(WARMUP_TOKENS, new_tokens))
    gc.collect()
    if moebius.is_patched(model):
        moebius.reset_stats(model)
    reset_peak_memory()
    runs.generations.append(generate_greedily(model, prompt, new_tokens))
    rss, gpu = peak_memory()
    runs.rss, runs.gpu = max(runs.rss, rss), max(runs.gpu, gpu)
    if moebius.is_patched(model):
        sums = moebius.stats(model).to_dict()
        runs.counts = {name: runs.counts.get(name, 0) + sums[name] for name in ("hits", "misses", "uploads")}


def _row(name: str, format: str, model: PreTrainedModel, prompt: torch.Tensor, expected: list[int], runs: _Runs) -> Row:
    compared = [compare_with_stock(model, prompt, expected, one.tokens) for one in runs.generations]
    differing = next((one for one in compared if not one.same), Agreement())
    speeds = [1 / seconds for one in runs.generations for seconds in one.step_s]
    low, high = (float(value) for value in np.percentile(speeds, [20, 80]))
    return Row(
        variant=name,
        expert_format=format,
        ttft_s=round(median(one.first_token_s for one in runs.generations), 6),
        decode_tok_s=round(median(one.decode_tok_s for one in runs.generations), 3),
        p20=round(low, 3),
        p80=round(high, 3),
        peak_rss_bytes=runs.rss,
        peak_gpu_bytes=runs.gpu,
        same_tokens=differing.same,
        first_difference=differing.first_difference,
        stock_margin=differing.margin,
        rounds=len(runs.generations),
        hits=runs.counts.get("hits"),
        misses=runs.counts.get("misses"),
        uploads=runs.counts.get("uploads"),
        overlap=runs.overlap,
    )


def reset_peak_memory() -> None:
    """Forget earlier peaks of this process and of the GPUs; only Linux can forget the process's."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    for device in _gpus():
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_memory() -> tuple[int, int]:
    """Peak bytes of this process and of all GPUs together, on Linux since `reset_peak_memory`."""
    gpu = sum(torch.get_device_module(device).max_memory_allocated(device) for device in _gpus())
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024, gpu
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss), gpu


def _gpus() -> list[torch.device]:
    kind = default_device()
    return [] if kind == "cpu" else [torch.device(kind, index) for index in range(torch.accelerator.device_count())]


def load(path: str, dtype: str) -> PreTrainedModel:
    """Load a checkpoint, or make random weights for the config of a folder or file that has none.

    Args:
        path: a model's folder or hub name, or a config.json.
        dtype: "auto" for the checkpoint's own, or a torch dtype's name.
    """
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_config(config, dtype=None if dtype == "auto" else dtype).eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def make_prompt(path: str, model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """A prompt int64 [1, tokens]: Python source in the model's own tokens, or random ids where it has no tokenizer."""
    if (Path(path) / "tokenizer_config.json").is_file() or not Path(path).exists():
        ids = AutoTokenizer.from_pretrained(path)(inspect.getsource(ArgumentParser), verbose=False)["input_ids"]
        ids = (ids * (tokens // len(ids) + 1))[:tokens]
        return torch.tensor([ids])
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
