"""How well both processors and the link overlap: a step's time against the longest of its parts, from a timeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from transformers import PreTrainedModel

from moebius.hf_plugin.running.timeline import CPU, DEVICE, LINK, STEPS, Slice, recorded
from moebius.hf_plugin.tools.generation import generate_greedily


@dataclass(frozen=True, slots=True)
class Overlap:
    """Decode steps of one generation; milliseconds, medians over the steps.

    Args:
        step_ms: from token to token.
        empty_ms: the same without experts: attention, routers, dispatch, launches.
        cpu_ms, device_ms, link_ms: how long each was busy with experts within a step.
        over_bound: (step - empty) / the longest of the three, the median over the steps: 1 where all work is hidden
            behind the longest part, and the sum over the longest where nothing overlaps. None without expert work.
    """

    step_ms: float
    empty_ms: float
    cpu_ms: float
    device_ms: float
    link_ms: float
    over_bound: float | None


def busy(slices: Sequence[Slice], tracks: Sequence[str], begin: float, end: float) -> float:
    """Seconds within ``begin..end`` in which at least one slice of these tracks ran."""
    total, reached = 0.0, begin
    for one in sorted((one for one in slices if one.track in tracks), key=lambda one: one.begin):
        first, last = max(one.begin, reached), min(one.end, end)
        if last > first:
            total += last - first
            reached = last
    return total


def measure(slices: Sequence[Slice], empty_s: float) -> Overlap:
    """The figures of a timeline's decode steps.

    Args:
        slices: with one slice on the track `STEPS` for each step.
        empty_s: seconds of a step without experts.

    Raises:
        ValueError: there are no steps.
    """
    steps = [(one.begin, one.end) for one in slices if one.track == STEPS]
    if not steps:
        raise ValueError("the timeline has no decode steps; generate two tokens or more while recording")
    parts = [[busy(slices, tracks, *step) for tracks in ((CPU,), (DEVICE,), LINK)] for step in steps]
    over = [
        (end - begin - empty_s) / max(times) for (begin, end), times in zip(steps, parts, strict=True) if max(times) > 0
    ]
    cpu, device, link = (1e3 * median(times) for times in zip(*parts, strict=True))
    step = 1e3 * median(end - begin for begin, end in steps)
    return Overlap(step, 1e3 * empty_s, cpu, device, link, median(over) if over else None)


def traced(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[list[Slice], Overlap]:
    """Generate once while recording and once without experts.

    Args:
        model: patched.
        prompt: int64 [1, P].
        new_tokens: at least 2.
    """
    with recorded(model) as timeline:
        generation = generate_greedily(model, prompt, new_tokens)
    for number, (begin, end) in enumerate(generation.steps):
        timeline.add(STEPS, f"token {number + 2}", begin, end)
    with without_experts(model):
        empty = generate_greedily(model, prompt, new_tokens)
    slices = timeline.slices()
    return slices, measure(slices, median(empty.step_s))


@contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """The patched model's layers are called as ever within the block, but every route goes to no expert."""
    from moebius.hf_plugin.running.layer import ATTRIBUTE

    layers = [module.__dict__[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in module.__dict__]
    for layer in layers:
        layer.__dict__["compute"] = _empty(layer.compute)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["compute"]


def _empty(compute):  # type: ignore[no-untyped-def]
    return lambda hidden, ids, weights: compute(hidden, torch.full_like(ids, -1), weights)
