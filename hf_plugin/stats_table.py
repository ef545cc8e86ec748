"""The table that `str(moebius.stats(model))` gives."""

from __future__ import annotations

import io
from itertools import takewhile
from typing import Any

from rich.console import Console
from rich.table import Table

from moebius.hf_plugin.stats import LayerStats, Stats

WIDTH = 132
_COLUMNS = (
    "layer",
    "tokens",
    "hits",
    "misses",
    "hit %",
    "uploads",
    "MB up",
    "prefetch",
    "used",
    "wasted",
    "recall %",
    "right %",
    "CPU ms",
    "GPU ms",
    "wait ms",
)


def render(stats: Stats) -> str:
    """The statistics as text, one row a layer and one for the sum, `WIDTH` columns wide."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
    console.print(table(stats))
    if len(stats.caches) > 1:
        for cache in stats.caches:
            size = f"{cache.slots} slots, {cache.cache_bytes / 2**20:.1f} MiB"
            console.print(f"{cache.device}: {cache.layers} layers, {size}", markup=False, highlight=False)
    for cache in stats.caches:
        console.print(_costs(cache.costs), markup=False, highlight=False)
    if stats.sums.disk_reads:
        console.print(_disk(stats.sums), markup=False, highlight=False)
    for note in stats.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")


def table(stats: Stats) -> Table:
    """The statistics as a rich table."""
    title = (
        f"{stats.device}: {stats.slots} slots, {stats.cache_bytes / 2**20:.1f} of {stats.expert_bytes / 2**20:.1f} MiB "
        f"of experts; policy {stats.policy}, predictor {stats.predictor}"
    )
    result = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        result.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer, name in zip(stats.layers, _short([layer.name for layer in stats.layers]), strict=True):
        result.add_row(*_row(layer, name))
    result.add_section()
    result.add_row(*_row(stats.sums, "sum"), style="bold")
    return result


def _costs(costs: dict[str, Any]) -> str:
    found = (("CPU", costs["cpu_us"][0]), ("GPU", costs["gpu_us"][0]), ("upload", costs["upload_us"]))
    parts = []
    for name, us in found:
        error = costs[f"{name.lower()}_error"]
        parts.append(f"{name} {us:.0f} us" + ("" if error is None else f" (off by {100 * error:.0f} %)"))
    return f"expected of an expert with one token: {', '.join(parts)}"


def _disk(sums: LayerStats) -> str:
    return (
        f"memory as a cache of a file: {sums.ram_hits} of {sums.ram_hits + sums.ram_misses} experts were in memory; "
        f"{sums.disk_bytes / 1e6:.1f} MB read in {sums.disk_reads} reads ({sums.read_ahead} ahead, "
        f"{sums.read_ahead_used} of these used); {sums.stall_ms:.1f} ms waited"
    )


def _short(names: list[str]) -> list[str]:
    """Names without what they all share: ``model.layers.7.mlp.experts`` becomes ``7``."""
    if len(names) < 2:
        return names
    parts = [name.split(".") for name in names]
    start, end = (_shared(side) for side in (parts, [part[::-1] for part in parts]))
    return [".".join(part[start : len(part) - end]) for part in parts]


def _shared(parts: list[list[str]]) -> int:
    """How many leading elements all lists have in common."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))


def _row(layer: LayerStats, name: str) -> list[str]:
    foreseen = f"{100 * layer.recall:.0f}" if layer.predicted_of else "-"
    return [
        name,
        f"{layer.tokens}",
        f"{layer.hits}",
        f"{layer.misses}",
        f"{100 * layer.hit_rate:.0f}",
        f"{layer.uploads}",
        f"{layer.upload_bytes / 1e6:.1f}",
        f"{layer.prefetch_issued}",
        f"{layer.prefetch_used}",
        f"{layer.prefetch_wasted}",
        foreseen,
        f"{100 * layer.precision_absent:.0f}" if layer.predicted_absent else "-",
        f"{layer.cpu_ms:.1f}",
        f"{layer.gpu_ms:.1f}",
        f"{layer.wait_ms:.1f}",
    ]
