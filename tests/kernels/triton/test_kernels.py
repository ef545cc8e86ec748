"""Runs `interpreted_kernels.py` with the interpreter on, which must be chosen before kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_kernels.py")
ROOT = CASES.parents[3]


def run_interpreted(cases: Path, *select: str) -> None:
    """Run the tests in a file with the interpreter on."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *select, str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_layer_in_the_interpreter():
    run_interpreted(CASES, "-k", "gated_with_biases")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    run_interpreted(CASES)
