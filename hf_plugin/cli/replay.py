"""`moebius replay`: cache policies and predictors on recorded routing, as a table, JSON or a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moebius.gpu_cache.policy import POLICIES
from moebius.hf_plugin.cli.console import err, out, print_json, progress_bar
from moebius.hf_plugin.tools import replay as replaying
from moebius.hf_plugin.tools.plots import new_figure
from moebius.hf_plugin.tools.trace_file import read_trace


def replay(
    trace: Annotated[Path, typer.Argument(help="Recorded routing, an npz file.")],
    capacity: Annotated[float, typer.Option(help="Share of each layer's experts that the cache holds.")] = 0.25,
    policy: Annotated[str, typer.Option(help=f"Of {', '.join(POLICIES)}, with commas between.")] = "default,lru",
    predictor: Annotated[str, typer.Option(help=f"One of {', '.join(replaying.PREDICTORS)}.")] = "none",
    upload_cost: Annotated[float, typer.Option(help="Cost of an upload, in misses.")] = 1.0,
    cold: Annotated[bool, typer.Option("--cold", help="Forget everything between sequences.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw hit rate against uploads to this PNG file.")] = None,
) -> None:
    """Judge cache policies on recorded routing, beside what a cache could do that knew the future."""
    names = [name.strip() for name in policy.split(",")]
    with progress_bar("replay") as update:
        update("reading", 0.0)
        result = replaying.judge(read_trace(trace), capacity, names, predictor, upload_cost, cold, update)
    if plot is not None:
        _draw(result, plot)
        err.print(f"wrote {plot}")
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: replaying.Result) -> None:
    title = f"{result.trace}, {result.tokens:,} tokens, {result.capacity:.1%} resident, an upload costs "
    table = Table(title=f"{title}{result.upload_cost:g} misses", title_justify="left")
    for name in ("policy", "predictor"):
        table.add_column(name)
    for name in ("hit rate", "uploads/token", "prefetches/token", "of them used", "cost/request"):
        table.add_column(name, justify="right")
    for row in result.rows:
        used = "" if row.prefetch_precision is None else f"{row.prefetch_precision:.1%}"
        numbers = (f"{row.hit_rate:.2%}", f"{row.uploads_per_token:.2f}", f"{row.prefetches_per_token:.2f}", used)
        table.add_row(row.policy, row.predictor, *numbers, f"{row.cost:.4f}")
    table.add_section()
    bound = result.bound
    for name, hit_rate, cost in (
        ("bound", bound.hit_rate, bound.cost),
        ("bound, one pool", bound.pooled_hit_rate, bound.pooled_cost),
    ):
        table.add_row(name, "", f"{hit_rate:.2%}", "", "", "", f"{cost:.4f}", style="dim")
    out.print(table)


def _draw(result: replaying.Result, path: Path) -> None:
    """Hit rate against uploads."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for row in result.rows:
        axes.plot(row.uploads_per_token, row.hit_rate, "o")
        label = row.policy if row.predictor == "none" else f"{row.policy} + {row.predictor}"
        axes.annotate(label, (row.uploads_per_token, row.hit_rate), xytext=(5, 2), textcoords="offset points", size=8)
    axes.axhline(result.bound.hit_rate, linestyle="--", color="grey", label="clairvoyant, without prefetch")
    axes.set_xscale("log")  # policies differ by factors of ten
    axes.margins(x=0.12)  # for the labels
    axes.set(xlabel="uploads per token", ylabel="hit rate", title=f"{result.trace}, {result.capacity:.0%} resident")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
