"""`moebius bench experts` and `moebius bench generate`: tables, or the same rows as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moebius.hf_plugin.cli.console import err, hide_progress_of_libraries, out, print_json, progress_bar
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.tools import bench_experts, bench_generate
from moebius.hf_plugin.tools.generation import require_model
from moebius.hf_plugin.tools.record import write_record
from moebius.kernels.formats import FORMATS

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)

EXPERTS_COLUMNS = {
    "format": "format",
    "tokens": "tokens",
    "median_us": "us",
    "p20_us": "p20",
    "p80_us": "p80",
    "gbytes_per_s": "GB/s",
    "stream_gbytes_per_s": "read GB/s",
    "tflops": "TFLOPS",
    "rel_error": "rel. error",
}
GENERATE_COLUMNS = {
    "variant": "variant",
    "expert_format": "experts in",
    "ttft_s": "first token s",
    "decode_tok_s": "tokens/s",
    "p20": "p20",
    "p80": "p80",
    "peak_rss_bytes": "RSS MB",
    "peak_gpu_bytes": "GPU MB",
    "same_tokens": "same text",
}
OVERLAP_COLUMNS = {
    "variant": "variant",
    "step_ms": "step ms",
    "empty_ms": "without experts",
    "cpu_ms": "CPU",
    "device_ms": "device",
    "link_ms": "link",
    "over_bound": "over bound",
}

Json = Annotated[bool, typer.Option("--json", help="Print the rows as one JSON document.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write rows, settings and machine to this JSON file.")]


@app.command()
def experts(
    shape: Annotated[str, typer.Option(help="E,H,I,K: experts, hidden, intermediate, top-k.")] = "128,2048,768,8",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens per call.")] = "1,4,32,256",
    formats: Annotated[str, typer.Option("--format", help=f"Of {', '.join(FORMATS)}.")] = "bf16",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default: 4 times the last-level cache.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Measured calls per row.")] = None,
    as_json: Json = False,
    out_file: Out = None,
) -> None:
    """One layer's experts on the CPU, beside a plain read of the same bytes."""
    counts = _whole_numbers("--tokens", tokens)
    names = [name.strip() for name in formats.split(",")]
    with progress_bar("experts") as update:
        measured = bench_experts.run(
            bench_experts.Shape.parse(shape), counts, names, threads, layers, repeats, progress=update
        )
        rows = [asdict(row) for row in measured]
    title = f"Experts {shape} on the CPU: {rows[0]['threads']} threads, {rows[0]['isa']}"
    _report(title, rows, EXPERTS_COLUMNS, as_json, out_file, {"shape": shape})


@app.command()
def generate(
    model: Annotated[str | None, typer.Option(help="Folder, hub name or config.json. Default: tests/data.")] = None,
    variants: Annotated[
        str, typer.Option(help=f"Of {', '.join(bench_generate.VARIANTS)}; moebius:int4 names an expert format.")
    ] = "stock,cpu,emulated",
    expert_format: Annotated[
        str, typer.Option(help=f"Of patched variants that name none: native, {', '.join(FORMATS)}.")
    ] = "native",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    gpu_memory: Annotated[str, typer.Option(help='Cache budget: bytes, "8GiB", "25%", a fraction, or auto.')] = "25%",
    dtype: Annotated[str, typer.Option(help="Dtype to load with; auto is the checkpoint's own.")] = "auto",
    trace: Annotated[Path | None, typer.Option(help="Write what ran where and when, for ui.perfetto.dev.")] = None,
    as_json: Json = False,
    out_file: Out = None,
) -> None:
    """Whole models, stock and patched in turn: time to first token, decode speed, memory, and equal tokens."""
    names = [name.strip() for name in variants.split(",")]
    bench_generate.check_settings(names, new_tokens, rounds)
    Options(expert_format=expert_format)  # refuses a wrong one before the model is loaded
    path = require_model(model)
    hide_progress_of_libraries()
    loaded = bench_generate.load(path, dtype)
    prompt = bench_generate.make_prompt(path, loaded, prompt_tokens)
    with progress_bar("generate") as update:
        options = {"gpu_memory": _memory(gpu_memory), "expert_format": expert_format}
        rows = bench_generate.run(loaded, prompt, names, new_tokens, rounds, options, update, trace)
    settings = {
        "model": Path(path).name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "gpu_memory": gpu_memory,
        "expert_format": expert_format,
        "method": bench_generate.METHOD,
    }
    title = f"{settings['model']}, {settings['dtype']}: {prompt_tokens} + {new_tokens} tokens, {rounds} rounds"
    _report(title, [asdict(row) for row in rows], GENERATE_COLUMNS, as_json, out_file, settings)
    if trace is not None:
        err.print(f"wrote {trace}; open it in https://ui.perfetto.dev")
        if not as_json:
            overlaps = [{"variant": row.variant} | asdict(row.overlap) for row in rows if row.overlap is not None]
            out.print(_table("Decode steps, and what their parts were busy for", overlaps, OVERLAP_COLUMNS))


def _whole_numbers(option: str, text: str) -> list[int]:
    """Read "1,4,32"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option} {text!r} must be positive whole numbers, such as 1,4,32")
    return numbers


def _memory(text: str) -> int | float | str:
    """The Python value that a memory option's text means: "0.25" is a fraction, "1000000" bytes, the rest stays."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _report(
    title: str,
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    as_json: bool,
    file: Path | None,
    settings: dict[str, Any],
) -> None:
    if file is not None:
        write_record(file, ["moebius", *sys.argv[1:]], settings, rows)
        err.print(f"wrote {file}")
    if as_json:
        print_json(rows)
    else:
        out.print(_table(title, rows, columns))


def _table(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    """The named fields of all rows under short headings; bytes in MB."""
    table = Table(title=title, title_justify="left")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in columns))
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 0.01 else f"{value:.3g}"
    return str(value)
