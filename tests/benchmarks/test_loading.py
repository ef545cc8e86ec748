"""The script that measures loading must run, and its variants must do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERT_BYTES = 8 * 32 * 3 * 1024 * 32 * 2  # of the smallest checkpoint that the script writes, in bf16


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="drops files from the page cache")
@pytest.mark.parametrize("layout", ["per-expert", "packed", "fp8", "mxfp4"])
def test_every_variant_loads(layout: str, tmp_path: Path) -> None:
    """Catches an option or name that has changed, and a variant that loads something else."""
    out = tmp_path / "loading.json"
    variants = {"per-expert": "read,converted", "packed": "stock,disk", "fp8": "native", "mxfp4": "native"}[layout]
    arguments = [
        "--gigabytes",
        "0.02",
        "--layout",
        layout,
        "--repeats",
        "1",
        "--variants",
        variants,
        "--json",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "loading.py"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == variants.split(",")
    assert all(row["load_s"] > 0 for row in rows.values())
    if layout == "per-expert":
        assert rows["converted"]["expert_bytes"] < 0.3 * EXPERT_BYTES, "not in int4"
    if layout in ("fp8", "mxfp4"):
        assert rows["native"]["expert_bytes"] < 0.6 * EXPERT_BYTES, "not in the checkpoint's codes"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux only")
def test_the_limited_run_gives_stocks_tokens(tmp_path: Path) -> None:
    """Catches a script that measures without its limit, or another model."""
    out = tmp_path / "limit.json"
    arguments = ["--gigabytes", "0.02", "--folder", str(tmp_path / "checkpoint"), "--json", str(out)]
    arguments += ["--limit", "2GB", "--cpu-memory", "20MB", "--new-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_limit", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["settings"]["limit"] == "RLIMIT_DATA"
    rows = {row["row"]: row for row in document["rows"]}
    assert rows["limited"]["same_tokens"]
    assert rows["again"]["same_tokens"]
    assert rows["limited"]["disk_bytes"] > 0
