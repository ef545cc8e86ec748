"""The script for a day with a GPU must run on that day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_dry_run_measures_every_part(tmp_path):
    """An import, an option or a name that has changed since the script last ran on a device."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["errors"] == []
    assert data["skipped"] == []
    kernels = {(row["kernel"], row["format"]) for row in data["rows"] if row["part"] == "kernel"}
    assert {("moebius", "int4"), ("grouped_mm", "bf16"), ("batched_mm", "bf16")} <= kernels
    assert all(row["error"] < 0.02 for row in data["rows"] if "error" in row), "timed what computes something else"
    launches = {(row["format"], row["tokens"]) for row in data["rows"] if row["part"] == "launches" and row["us"]}
    assert launches >= {("bf16", 1), ("int4", 20)}
    models = {(row["variant"], row["format"], row["budget"]) for row in data["rows"] if row["part"] == "model"}
    budgets = {("moebius", format, budget) for format in ("bf16", "int4") for budget in (0.125, 0.25, 0.5, 0.75, 1.0)}
    budgets |= {("fetch only", format, budget) for _, format, budget in budgets if budget < 1}
    assert budgets | {("cpu", "bf16", 0.0), ("cpu", "int4", 0.0), ("stock", "bf16", 1.0)} == models
    fetched = [row["per_step"] for row in data["rows"] if row.get("variant") == "fetch only"]
    assert all(step["cpu_ms"] == 0 and step["link_ms"] > 0 for step in fetched), "computed misses on the CPU"
    errors = [row["logits_error"] for row in data["rows"] if "logits_error" in row]
    assert len(errors) == 6
    assert max(errors) < 0.02, "timed a model that computes something else"
    timeline = json.loads((tmp_path / "gpu_moebius_bf16_0.25.trace.json").read_text())
    assert {event["cat"] for event in timeline["traceEvents"] if "cat" in event} >= {"steps", "device experts"}


def test_a_part_that_fails_leaves_its_traceback_and_the_others_go_on(tmp_path, monkeypatch):
    """Catches a run of which nothing is left, and a failure that nobody sees."""

    def fail(*_):
        raise RuntimeError("injected: illegal memory access")

    monkeypatch.setattr(gpu, "measure_copies", fail)
    out = tmp_path / "gpu.json"
    gpu.main(["--dry-run", "--parts", "kernels", "--out", str(out)])
    data = json.loads(out.read_text())
    assert [error["part"] for error in data["errors"]] == ["copies"]
    assert "in fail" in data["errors"][0]["error"]
    kernels = [row for row in data["rows"] if row["part"] == "kernel"]
    assert {row["kernel"] for row in kernels} == {"moebius", "grouped_mm", "batched_mm"}
    assert all(row["share_of_copy"] is None for row in kernels if row["kernel"] == "moebius")


def test_no_part_begins_after_the_deadline():
    """Catches a run that is cut off in its last part, and rows that are missing without a word."""
    data = gpu.main(["--dry-run", "--seconds", "0"])
    assert data["rows"] == []
    assert "model bf16" in data["skipped"]
    assert {"sweep bf16 decode", "sweep int4 prompt"} <= {*data["skipped"]}
