"""A patched model in the child of a fork works, or says why not; it never hangs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
RunPython = Callable[..., subprocess.CompletedProcess[str]]

_FORK = """
import os, signal, threading
import torch
from transformers import AutoModelForCausalLM
import moebius
signal.alarm(150)
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("tests/data/tiny_moe", dtype=torch.float32)
ids = torch.arange(12)[None]
with torch.inference_mode():
    stock = model(ids).logits
    moebius.patch(model, device={device!r}, gpu_memory=0.25, cpu_threads=2)
    model(ids)  # compiles
    stop = threading.Event()
    def work():
        with torch.inference_mode():
            while not stop.is_set():
                model(ids)
    other = threading.Thread(target=work)
    other.start()
    for attempt in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            same = torch.allclose(model(ids).logits, stock, atol=1e-4)
            moebius.unpatch(model)
            os._exit(0 if same and torch.equal(model(ids).logits, stock) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    other.join()
    assert torch.allclose(model(ids).logits, stock, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_child_runs_and_unpatches_the_model(device: str, run_python: RunPython) -> None:
    """Bug: the child waits for the model's lock, or for copies, that threads of the parent hold."""
    run_python(_FORK.format(device=device), cwd=_ROOT, path=(_ROOT,))


_EXIT = """
import os, signal, sys, threading
import torch
from transformers import AutoModelForCausalLM
import moebius
from moebius.hf_plugin.patching import runtimes
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("tests/data/tiny_moe", dtype=torch.float32)
moebius.patch(model, device="emulated", gpu_memory=0.25)
with torch.inference_mode():
    model(torch.arange(12)[None])
[runtime] = runtimes(model)
queue = runtime.tiers[0].cache.device._copies._queue
held, free = threading.Event(), threading.Event()
def hold():  # as the copy thread does for a moment after each copy
    with queue.changed:
        held.set()
        free.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    sys.exit(0)
free.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_exits(run_python: RunPython) -> None:
    """Bug: at its end the parent's cache is closed: it waits for a lock for ever, or calls CUDA after a fork."""
    run_python(_EXIT, cwd=_ROOT, path=(_ROOT,))
