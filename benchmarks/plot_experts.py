"""Draw recorded results of one layer's experts: GB/s of weights and tokens/s over tokens, ours and others'.

    python benchmarks/plot_experts.py RESULT.json [RESULT.json ...] --out benchmarks/results/NAME.png

Takes what `moebius bench experts --out`, `experts_vs_stock.py` and `peer.py` wrote, of one shape; of a peer the thread
count that was fastest, and of several files with the same row the first. Bytes are those of each distinct expert once a
call: for rows that do not tell, of as many as random ids name on average.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from moebius.hf_plugin.tools.plots import new_figure
from moebius.kernels.experts import ExpertSpec, RecordLayout

STYLES = {"bf16": "-", "int8": "--", "int4": ":"}


class Point(NamedTuple):
    """One measured row."""

    engine: str
    format: str
    tokens: int
    gbytes_per_s: float
    tokens_per_s: float


def points_of(document: dict[str, Any]) -> list[Point]:
    """The rows of one results file, the best thread count of each."""
    shape = document["shape"] if "shape" in document else document["settings"]["shape"]
    numbers = [int(part) for part in shape.split(",")]
    best: dict[tuple[str, str, int], Point] = {}
    for row in document["rows"]:
        for point in _points(row, document.get("settings", {}).get("engine", "Moebius"), numbers):
            known = best.get(point[:3])
            if known is None or point.tokens_per_s > known.tokens_per_s:
                best[point[:3]] = point
    return list(best.values())


def _points(row: dict[str, Any], engine: str, shape: list[int]) -> list[Point]:
    tokens = row["tokens"]
    if "variant" in row:  # of experts_vs_stock.py
        stock, format = row["variant"].startswith("stock"), row["variant"].removeprefix("stock ")
        speed = _expected_bytes(shape, format, tokens) / row["median_ms"] / 1e6
        name = "transformers" if stock else engine
        return [Point(name, format, tokens, speed, tokens / row["median_ms"] * 1e3)]
    found = [Point(engine, row["format"], tokens, row["gbytes_per_s"], tokens / row["median_us"] * 1e6)]
    if "stream_gbytes_per_s" in row:
        speed = row["stream_gbytes_per_s"]
        found.append(Point("plain read", row["format"], tokens, speed, found[0].tokens_per_s * speed / found[0][3]))
    return found


def _expected_bytes(shape: list[int], format: str, tokens: int) -> float:
    experts, hidden, intermediate, top_k = shape
    record = RecordLayout.of(ExpertSpec(hidden, intermediate), format).nbytes
    return experts * (1 - (1 - top_k / experts) ** tokens) * record


def draw(points: list[Point], title: str, file: Path) -> None:
    """Two panels over tokens; a colour for each engine, a line style for each format."""
    figure = new_figure(11, 5)
    panels = figure.subplots(1, 2)
    engines = list(dict.fromkeys(point.engine for point in points))
    for number, engine in enumerate(engines):
        for format in dict.fromkeys(point.format for point in points if point.engine == engine):
            line = sorted((p for p in points if (p.engine, p.format) == (engine, format)), key=lambda p: p.tokens)
            style = {"color": f"C{number}", "linestyle": STYLES.get(format, "-."), "marker": "o", "markersize": 3}
            for axes, field in zip(panels, ("gbytes_per_s", "tokens_per_s"), strict=True):
                heights = [getattr(point, field) for point in line]
                axes.plot([point.tokens for point in line], heights, label=f"{engine}, {format}", **style)
    for axes, label in zip(panels, ("GB/s of weights", "tokens/s of one layer"), strict=True):
        axes.set(xlabel="tokens in a call", ylabel=label, xscale="log")
        axes.set_xticks(sorted({point.tokens for point in points}), labels=sorted({point.tokens for point in points}))
        axes.xaxis.minorticks_off()
    panels[0].set(ylim=(0, None))
    panels[1].set(yscale="log")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    documents = [json.loads(file.read_text()) for file in arguments.results]
    points: dict[tuple[str, str, int], Point] = {}
    for point in (point for document in documents for point in points_of(document)):
        points.setdefault(point[:3], point)
    first = documents[0]
    machine = first["processor"] if "processor" in first else first["cpu"]["model"]
    shape = first["shape"] if "shape" in first else first["settings"]["shape"]
    draw(list(points.values()), f"Experts on the CPU, E,H,I,top-k = {shape}, {machine}", arguments.out)


if __name__ == "__main__":
    main()
