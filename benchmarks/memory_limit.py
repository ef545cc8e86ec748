"""A checkpoint within less memory than its experts take: stock's tokens, under a limit that the kernel enforces.

    python -m benchmarks.memory_limit --layout packed --folder /somewhere --limit 1.2GB --json limit.json

The checkpoint is that of `benchmarks.loading`. Each row is a process of its own that loads and generates: `stock`
without a limit; `limited` with `cpu_memory`, which writes the file of records, and `again`, which finds it; `whole`,
which is to hold all experts and must fail, so that the limit is seen to be real. The limit is RLIMIT_DATA from the
first line on: all private memory, imports included. With --cgroup FOLDER, a memory cgroup that exists and is limited,
the processes enter that instead, and the page cache of what they read counts too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.loading import LAYOUTS, Peak, forget, generate, record, size_of, use_compiled_kernels

ROWS = ("stock", "limited", "again", "whole")


def run(row: str, folder: Path, cpu_memory: str, new_tokens: int) -> dict[str, Any]:
    """Load in this process and generate."""
    import torch
    from transformers import AutoModelForCausalLM

    import moebius

    peak = Peak()
    begun = time.perf_counter()
    if row == "stock":
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    else:
        options: Any = {"cpu_memory": cpu_memory} if row != "whole" else {"cpu_memory": 1.0, "expert_format": "fp32"}
        model = moebius.from_pretrained(str(folder), device="cpu", **options)
    loaded = time.perf_counter() - begun
    ids, exactly = torch.arange(16)[None], {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=1, **exactly)
    if row != "stock":
        moebius.reset_stats(model)
    begun = time.perf_counter()
    tokens = model.generate(ids, max_new_tokens=new_tokens, **exactly)[0].tolist()
    seconds = time.perf_counter() - begun
    result = {"load_s": loaded, "tokens_per_s": new_tokens / seconds, "tokens": tokens[16:], **peak.stop()}
    if row != "stock":
        sums = moebius.stats(model).to_dict()
        names = ("expert_bytes", "disk_bytes", "disk_reads", "ram_hits", "ram_misses", "stall_ms", "cpu_ms")
        result |= {name: sums[name] for name in names}
    return result


def measure(row: str, arguments: list[str], limit: int, cgroup: Path | None, cache: Path) -> dict[str, Any]:
    """One row, in a process with the limit; what it fails with is a result."""

    def enter() -> None:
        if row == "stock":
            return
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-m", "benchmarks.memory_limit", "--row", row, *arguments]
    environment = {**os.environ, "MOEBIUS_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode:  # a negative one is a signal: the kernel has ended it
        error = f"signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip().splitlines()[-1][:300]
        return {"row": row, "failed": error}
    result: dict[str, Any] = {"row": row, **json.loads(done.stdout.splitlines()[-1])}
    if cgroup is not None and row != "stock":
        peaks = [cgroup / "memory.peak", cgroup / "memory.max_usage_in_bytes"]
        result["cgroup_peak_bytes"] = next(int(path.read_text()) for path in peaks if path.exists())
    return result


def show(row: dict[str, Any]) -> None:
    """A row as text."""
    if "failed" in row:
        print(f"{row['row']}: {row['failed']}", flush=True)
        return
    same = f", same tokens: {row['same_tokens']}" if "same_tokens" in row else ""
    print(
        f"{row['row']}: loaded in {row['load_s']:.1f} s, {row['tokens_per_s']:.2f} tokens/s, "
        f"{row['peak_bytes'] / 1e9:.2f} GB of its own memory at most{same}", flush=True,
    )  # fmt: skip
    if "disk_bytes" in row:
        print(
            f"    {row['ram_hits']} hits, {row['ram_misses']} misses, {row['disk_bytes'] / 1e9:.2f} GB read, "
            f"{row['stall_ms'] / 1e3:.1f} s waited", flush=True,
        )  # fmt: skip


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--layout", choices=LAYOUTS, default="per-expert")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be written")
    parser.add_argument("--limit", default="1.2GB")
    parser.add_argument("--cpu-memory", default="400MB", help="the option of the limited rows")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--cgroup", type=Path, help="folder of a limited memory cgroup")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        print(json.dumps(run(chosen.row, chosen.folder, chosen.cpu_memory, chosen.new_tokens)))
        return
    from moebius.hf_plugin.options import parse_memory

    if not chosen.folder.exists():
        generate(chosen.folder, chosen.gigabytes, chosen.layout)
    limit = parse_memory(chosen.limit, 0)
    assert limit is not None
    arguments = ["--folder", str(chosen.folder), "--cpu-memory", chosen.cpu_memory]
    arguments += ["--new-tokens", str(chosen.new_tokens)]
    with tempfile.TemporaryDirectory(dir=chosen.folder.parent) as work:
        use_compiled_kernels(Path(work))
        rows: list[dict[str, Any]] = []
        for name in ROWS:
            forget(chosen.folder)
            row = measure(name, arguments, limit, chosen.cgroup, Path(work))
            if rows and "tokens" in row:
                row["same_tokens"] = row["tokens"] == rows[0]["tokens"]
            rows.append(row)
            show(row)
    if chosen.json:
        facts = {"layout": chosen.layout, "file_bytes": size_of(chosen.folder), "limit_bytes": limit}
        facts["limit"] = "RLIMIT_DATA" if chosen.cgroup is None else "cgroup"
        folders = {"FOLDER": chosen.folder, "CGROUP": chosen.cgroup}
        record("benchmarks.memory_limit", chosen.json, folders, facts, rows)


if __name__ == "__main__":
    main()
