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
@pytest.mark.parametrize("layout", ["per-expert", "packed"])
def test_every_variant_loads(layout: str, tmp_path: Path) -> None:
    """Catches an option or name that has changed, and a variant that loads something else."""
    out = tmp_path / "loading.json"
    variants = {"per-expert": "read,converted", "packed": "stock,disk"}[layout]
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
