"""`moebius doctor`: the report of `moebius.hf_plugin.tools.doctor`, as tables or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moebius.hf_plugin.cli.console import out, print_json, progress_bar
from moebius.hf_plugin.running.expert_files import CachedFile
from moebius.hf_plugin.tools.doctor import Finding, Report, examine

GIB = 1 << 30


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Examine this machine: what Moebius will use, what it falls back to, and why."""
    with progress_bar("examining the machine") as update:
        report = examine(update)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show(report: Report) -> None:
    facts = Table("", "", title="This machine", show_header=False, title_justify="left")
    for name, value in _facts(report):
        facts.add_row(name, value)
    out.print(facts)
    plan = Table("component", "uses", "because", title="What Moebius will use", title_justify="left")
    for part in report.plan:
        plan.add_row(part.component, f"[yellow]{part.used}[/]" if part.fallback else part.used, part.reason)
    out.print(plan)
    if any(part.fallback for part in report.plan):
        out.print("[yellow]Yellow[/] is a fallback: it works, but something faster exists.")


def _facts(report: Report) -> list[tuple[str, str]]:
    cpu, memory = report.cpu, report.memory
    caches = ", ".join(f"L{c.level} {c.instances} x {c.bytes_each >> 10:,} KiB" for c in cpu.caches)
    gpus = ", ".join(
        f"{g.device}: {g.name} {g.capability} ({g.free_bytes / GIB:.1f} of {g.total_bytes / GIB:.1f} GiB free)"
        for g in report.gpus
    )
    speed = memory.read_gbytes_per_s
    return [
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)),
        ("processor", cpu.model),
        ("cores", f"{cpu.physical_cores} physical, {cpu.logical_cores} logical, {cpu.usable_cores} usable here"),
        ("instructions", ", ".join(cpu.instruction_sets) or "unknown"),
        ("caches", caches or "unknown"),
        ("memory", f"{memory.available_bytes / GIB:.1f} of {memory.total_bytes / GIB:.1f} GiB available"),
        ("memory read", f"{speed:.1f} GB/s with {memory.threads} threads (measured)" if speed else "not measured"),
        ("GPU", gpus or "none"),
        ("Triton", _say(report.triton)),
        ("pinned memory", _say(report.pinned_memory)),
        ("transformers", _say(report.transformers)),
        ("kernel cache", report.kernel_cache.folder or report.kernel_cache.reason),
        ("expert cache", _kept(report.expert_cache)),
    ]


def _kept(files: list[CachedFile]) -> str:
    """What `cpu_memory` has left on disk; deleting it costs no more than writing it again."""
    if not files:
        return "empty"
    nbytes, gone = sum(file.nbytes for file in files), sum(not file.usable for file in files)
    old = f", {gone} of them of checkpoints that are gone or have changed" if gone else ""
    return f"{nbytes / 1e9:.2f} GB in {Path(files[0].path).parent} ({len(files)} files{old}); delete what is not needed"


def _say(finding: Finding) -> str:
    return f"{'yes' if finding.usable else 'no'}: {finding.reason}"
