"""What a process may do to the kernels: fork, compile in several processes at once, hand over awkward memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import RECORD_ALIGNMENT, Activation, ExpertSpec
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes

from .moe_layers import expected, random_routes, random_store

_ROOT = Path(__file__).parents[2]
RunPython = Callable[..., subprocess.CompletedProcess[str]]
FORMATS = ["fp32", "bf16", "fp16", "int8", "int4"]


@pytest.fixture(scope="module")
def executor() -> Iterator[CpuExecutor]:
    made = CpuExecutor(2)
    yield made
    made.close()


_FORK_WHILE_COMPILING = """
import os, signal, threading
import numpy as np
from moebius.kernels.numba import jit, jobs, quantizer
from moebius.kernels.routes import build_routes
signal.alarm(120)
begun, compile_it = threading.Event(), jit.Entry._compile

def announced(entry):
    begun.set()
    return compile_it(entry)

def sorted_experts():
    return build_routes(np.array([[1, 0]]), np.ones((1, 2), np.float32), 2).experts.tolist()

jit.Entry._compile = announced
compiling = threading.Thread(target=lambda: quantizer.quantize_rows.compiled)
compiling.start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if sorted_experts() == [0, 1] and quantizer.quantize_rows.compiled else 1)
compiling.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert sorted_experts() == [0, 1]
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_thread_compiles_can_compile(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: the child waits for ever for a compiler's lock, whose holder exists in the parent only."""
    run_python(_FORK_WHILE_COMPILING, cwd=_ROOT, path=(_ROOT,), MOEBIUS_CACHE_DIR=str(tmp_path))


_COMPILE = """
import pathlib, sys, time
import numpy as np, torch
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.packing import pack, unpack
from moebius.kernels.routes import build_routes
go, ready = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ready.touch()
while not go.exists():
    time.sleep(0.01)
layout = RecordLayout.of(ExpertSpec(64, 32), "int4")
records = torch.zeros(layout.nbytes, dtype=torch.uint8)
pack(layout, records, {"up": torch.ones(32, 64)})
assert torch.allclose(unpack(layout, layout.stored(records)).up, torch.ones(32, 64), rtol=1e-3)
assert build_routes(np.array([[1, 0]]), np.ones((1, 2), np.float32), 2).experts.tolist() == [0, 1]
"""


@pytest.mark.slow
def test_processes_that_compile_at_once_share_a_folder_and_leave_the_install_alone(tmp_path: Path) -> None:
    """Bug: two writers of one index, a half-written file that is loaded, or anything written beside the sources."""
    before = {path for part in ("kernels", "cpu_experts", "moebius") for path in (_ROOT / part).rglob("*")}
    environment = os.environ | {"MOEBIUS_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    go, ready = tmp_path / "go", [tmp_path / f"ready{number}" for number in range(3)]
    children = [
        subprocess.Popen([sys.executable, "-c", _COMPILE, str(go), str(sign)], cwd=_ROOT, env=environment)
        for sign in ready
    ]
    while not all(sign.exists() for sign in ready):
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    go.touch()
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert list((tmp_path / "cache").rglob("*.nbc"))
    assert {path for part in ("kernels", "cpu_experts", "moebius") for path in (_ROOT / part).rglob("*")} == before


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element behind a cache line."""
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    start = -memory.data_ptr() // tensor.element_size() % (64 // tensor.element_size()) + 1
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_and_outputs_at_any_address(executor: CpuExecutor, format: str, x_dtype: torch.dtype) -> None:
    """Bug: an aligned load or store of a tensor that is a slice of another: the process dies."""
    store = random_store(ExpertSpec(77, 45, biased=True), format, 3)
    for tokens in (1, 3, 30):
        x, routes = torch.randn(tokens, 77).to(x_dtype), random_routes(tokens, 2, 3)
        plain, out = torch.zeros(tokens, 77), _shifted(torch.zeros(tokens, 77))
        executor.run(store, x, routes, plain)
        executor.run(store, _shifted(x), routes, out)
        assert torch.equal(out, plain)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_at_any_address_are_packed(format: str, dtype: torch.dtype) -> None:
    """Bug: a checkpoint's tensor begins at an odd element, and the quantiser reads it with aligned loads."""
    store = random_store(ExpertSpec(70, 40), format, 2)
    weights = {name: torch.randn(2, *shape).to(dtype) for name, shape in store.layout.shapes().items()}
    pack(store.layout, store.records.zero_(), weights)
    plain = store.records.clone()
    pack(store.layout, store.records.zero_(), {name: _shifted(weight) for name, weight in weights.items()})
    assert torch.equal(store.records, plain)
    assert plain.any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_experts_in_a_read_only_mapped_file(executor: CpuExecutor, format: str, tmp_path: Path) -> None:
    """Bug: kernels write to records, or read beyond a file that ends with the last of them."""
    source = random_store(ExpertSpec(72, 40, biased=True), format, 4)
    file, page = tmp_path / "experts", mmap.PAGESIZE
    header = page - source.nbytes % page  # so that the last record ends with the last page
    assert header % RECORD_ALIGNMENT == 0
    file.write_bytes(bytes(header) + source.records.numpy().tobytes())
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    records = torch.frombuffer(mapped, dtype=torch.uint8)[header:].view(source.records.shape)
    store = ExpertStore(source.spec, source.layout, 4, records)
    for tokens in (1, 3, 30):
        x, routes, out, plain = torch.randn(tokens, 72), random_routes(tokens, 2, 4), *torch.zeros(2, tokens, 72)
        executor.run(store, x, routes, out)
        executor.run(source, x, routes, plain)
        assert torch.equal(out, plain)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-39])
@pytest.mark.parametrize("place", ["x", "gate", "up", "down"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_special_values_go_where_torch_lets_them_go(
    executor: CpuExecutor, format: str, value: float, place: str, x_dtype: torch.dtype, tokens: int
) -> None:
    """Bug: a tile that reads a neighbour's NaN, a masked tail that makes one, a flag that hides one."""
    activation = Activation(alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0)
    store = random_store(ExpertSpec(37, 21, activation=activation), format, 2)
    x = torch.randn(tokens + 1, 37).to(x_dtype)
    (x if place == "x" else getattr(store.weights(0), place))[0, -1] = value
    routes = build_routes(np.array([[0]] * tokens + [[1]]), np.ones((tokens + 1, 1), np.float32), 2)
    out = torch.zeros(tokens + 1, 37)
    executor.run(store, x, routes, out)
    exact = expected(store, x, routes, torch.zeros(tokens + 1, 37))
    bound = 2**-6 if x_dtype == torch.bfloat16 and format == "bf16" else 1e-5  # intermediates in bf16
    torch.testing.assert_close(out.double(), exact, equal_nan=True, rtol=bound, atol=bound)
