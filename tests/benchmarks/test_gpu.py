"""The script for a day with a GPU must run on that day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_dry_run_measures_every_part(tmp_path):
    """An import, an option or a name that has changed since the script last ran on a device."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(out)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["errors"] == []
    assert data["skipped"] == []
    kernels = {(row["kernel"], row["format"]) for row in data["rows"] if row["part"] == "kernel"}
    assert {("moebius", "int4"), ("grouped_mm", "bf16"), ("batched_mm", "bf16")} <= kernels
    assert all(row["error"] < 0.02 for row in data["rows"] if "error" in row), "timed what computes something else"
    models = {(row["variant"], row["format"], row["budget"]) for row in data["rows"] if row["part"] == "model"}
    budgets = {("moebius", format, budget) for format in ("bf16", "int4") for budget in (0.125, 0.25, 0.5, 0.75, 1.0)}
    assert budgets | {("fetch only", "int4", 0.25), ("cpu", "bf16", 0.0), ("stock", "bf16", 1.0)} <= models
