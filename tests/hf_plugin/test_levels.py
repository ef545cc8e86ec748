"""A level in MOEBIUS_ISA that is not there: every way in says so in one line, and the doctor shows it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_MAIN = "import sys; from moebius.hf_plugin.cli.app import main; sys.argv = ['moebius', *sys.argv[1:]]; main()"
_PATCH = """
import torch, moebius
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tests/data/tiny_moe")
before = {n: w.clone() for n, w in model.state_dict().items()}
try:
    moebius.patch(model, device="cpu")
except RuntimeError as error:
    print(error)
assert not moebius.is_patched(model)
assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
"""


def run(code: str, *arguments: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MOEBIUS_ISA": level, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)


pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["warmup", "--expert-format", "int4"], ["bench", "experts", "--shape", "8,64,32,2"], ["bench", "generate"]],
    ids=["warmup", "bench experts", "bench generate"],
)
def test_commands_refuse_in_one_line(command: list[str]) -> None:
    """Bug: a traceback out of an import, or kernels for another processor than the one that was asked for."""
    done = run(_MAIN, *command, level="avx1024")
    assert done.returncode == 2
    assert "MOEBIUS_ISA=avx1024 is unknown; choose one of portable" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_patch_refuses_and_leaves_the_model_alone() -> None:
    """Bug: the model is patched, and the first call of it fails."""
    done = run(_PATCH, level="avx1024")
    assert done.returncode == 0, done.stderr
    assert "avx1024 is unknown" in done.stdout


@pytest.mark.slow
def test_doctor_shows_it() -> None:
    """Bug: the one command that explains the machine dies of what it should explain."""
    done = run(_MAIN, "doctor", "--json", level="avx1024")
    assert done.returncode == 0, done.stderr
    [part] = [part for part in json.loads(done.stdout)["plan"] if part["component"] == "experts on the CPU"]
    assert part["fallback"]
    assert "avx1024 is unknown" in part["reason"]
