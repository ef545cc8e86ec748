"""What ran where and when while a model computed: layers, CPU experts, launches and copies, as a Chrome trace.

Recording notes a pair of times for what the host does, and keeps the completions of what the device does, whose times
are asked for afterwards. Off, it costs a comparison here and there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from moebius.gpu_cache.device import Timed, Transfer
from moebius.gpu_cache.policy import Reason

# Tracks, from top to bottom. Demand has a stream of its own, so that its copies may overlap the others.
STEPS, LAYERS, CPU, DEVICE, DEMAND, BACKGROUND = (
    "steps",
    "layers (host)",
    "CPU experts",
    "device experts",
    "link: demand",
    "link: background",
)
TRACKS = (STEPS, LAYERS, CPU, DEVICE, DEMAND, BACKGROUND)
LINK = (DEMAND, BACKGROUND)


class Slice(NamedTuple):
    """Something that ran; times in seconds of `perf_counter`."""

    track: str
    name: str
    begin: float
    end: float
    facts: dict[str, Any]


class Timeline:
    """Everything recorded so far, in no order."""

    def __init__(self) -> None:
        self._slices: list[Slice] = []
        self._under_way: list[tuple[str, str, Timed, dict[str, Any]]] = []

    def add(self, track: str, name: str, begin: float, end: float, **facts: Any) -> None:
        """Something that the host has done."""
        self._slices.append(Slice(track, name, begin, end, facts))

    def watch(self, track: str, name: str, completion: Timed, **facts: Any) -> None:
        """Something that a device is doing."""
        self._under_way.append((track, name, completion, facts))

    def copy(self, layer: int, experts: list[int], reason: Reason, copy: Transfer) -> None:
        """A copy that begins, of one expert or several, as `ExpertCache.watch` reports it."""
        track = DEMAND if reason is Reason.DEMAND else BACKGROUND
        name = f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"
        self.watch(track, name, copy, layer=layer, experts=len(experts), reason=reason.name.lower())

    def slices(self) -> list[Slice]:
        """All that has ended, by its beginning; what failed or is under way is left out."""
        for track, name, completion, facts in self._under_way:
            if completion.done() and completion.error is None and (span := completion.span()) is not None:
                self._slices.append(Slice(track, name, *span, facts))
        self._under_way.clear()
        return sorted(self._slices, key=lambda one: one.begin)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Timeline]:
    """Record what the patched model does within the block.

    Raises:
        ValueError: the model is not patched.
    """
    from moebius.hf_plugin.patching import runtimes
    from moebius.hf_plugin.running.tiers import distinct

    timeline, found = Timeline(), runtimes(model)
    caches = [tier.cache for runtime in found for tier in distinct(runtime.tiers)]
    for runtime in found:
        runtime.timeline = timeline
    for cache in caches:
        cache.watch(timeline.copy)
    try:
        yield timeline
        for cache in caches:
            cache.drain()
    finally:
        for runtime in found:
            runtime.timeline = None
        for cache in caches:
            cache.watch(None)


def write_trace(path: Path, timelines: dict[str, Sequence[Slice]]) -> None:
    """Write timelines, each as a process of its name, for chrome://tracing and https://ui.perfetto.dev.

    The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    events: list[dict[str, Any]] = []
    for process, (name, slices) in enumerate(timelines.items(), 1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for number, track in enumerate(TRACKS, 1):
            place = {"ph": "M", "pid": process, "tid": number}
            events.append(place | {"name": "thread_name", "args": {"name": track}})
            events.append(place | {"name": "thread_sort_index", "args": {"sort_index": number}})
        start = min((one.begin for one in slices), default=0.0)
        events += [_event(process, start, one) for one in slices]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False) + "\n")


def _event(process: int, start: float, one: Slice) -> dict[str, Any]:
    times = {"ts": (one.begin - start) * 1e6, "dur": max(one.end - one.begin, 0.0) * 1e6}
    place = {"pid": process, "tid": TRACKS.index(one.track) + 1}
    return {"ph": "X", "name": one.name, "cat": one.track, **times, **place, "args": one.facts}
