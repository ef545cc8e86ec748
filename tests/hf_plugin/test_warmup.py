"""`moebius warmup`: what it compiled is all that a first call needs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
RunPython = Callable[..., subprocess.CompletedProcess[str]]

_WARM = """
import sys
from moebius.hf_plugin.cli.app import main
sys.argv = ["moebius", "warmup", "--expert-format", "int4", {config!r}]
main()
"""
_FIRST_CALL = """
import gc, torch
from transformers import AutoModelForCausalLM
import moebius
from moebius.kernels.numba.jit import Entry
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
moebius.patch(model, device="emulated", gpu_memory=0.25, expert_format="int4", keep_original=True, cpu_threads=2)
model.generate(torch.arange(20)[None], max_new_tokens=3, do_sample=False)
used = [entry for entry in gc.get_objects() if isinstance(entry, Entry) and "compiled" in entry.__dict__]
loaded = [entry.compiled.cache_hits if entry.callback else entry.compiled.stats.cache_hits for entry in used]
print(len(used), [entry.function.__qualname__ for entry, hits in zip(used, loaded) if not hits])
"""


@pytest.mark.slow
def test_a_first_call_after_warmup_compiles_nothing(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: warmup forgets the worker threads, the quantiser or the cache's code, and the first call takes seconds."""
    folder = _ROOT / "tests" / "data" / "tiny_moe"
    run_python(_WARM.format(config=str(folder / "config.json")), cwd=_ROOT, MOEBIUS_CACHE_DIR=str(tmp_path))
    done = run_python(_FIRST_CALL.format(folder=str(folder)), cwd=_ROOT, MOEBIUS_CACHE_DIR=str(tmp_path))
    number, names = done.stdout.strip().split(" ", 1)
    assert names == "[]"
    assert int(number) >= 9
