"""What all tests share: torch on one thread, the skipping of GPU tests, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Torch's sums then do not depend on the machine, and its threads do not spin beside those of the CPU's experts.
torch.set_num_threads(1)

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch finds no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run Python code in a process of its own and return it when it succeeded; its output is in the failure otherwise.

    ``cwd`` is the process's folder and ``path`` what is prepended to its module search path.
    """

    def run(code: str, *, cwd: Path, path: tuple[Path, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        python_path = os.pathsep.join(str(entry) for entry in path)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": python_path, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run
