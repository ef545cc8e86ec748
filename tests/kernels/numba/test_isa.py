"""Every instruction set gives the same mathematics, and never an instruction beyond it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.kernels.numba import isa
from moebius.kernels.numba.jobs import find_range_error

_ROOT = Path(__file__).parents[3]
RunPython = Callable[..., subprocess.CompletedProcess[str]]
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")

# Formats of each kind, odd sizes, one, few and many tokens per expert, then the assembly of what just ran.
_CHECK = """
import numpy as np, torch
from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.experts import Act, Activation, ExpertSpec, RecordLayout
from moebius.kernels.numba import work
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes
executor, torch_seed = CpuExecutor(2), torch.manual_seed(0)
entries = {"bf16": work.work_bf16, "fp16": work.work_fp16, "int8": work.work_rounding_int8,
           "int4": work.work_rounding_int4}
for format, entry in entries.items():
    for kind in (Act.SILU, Act.GELU_ERF):
        spec = ExpertSpec(147, 83, biased=True, activation=Activation(kind))
        store = ExpertStore.empty(spec, RecordLayout.of(spec, format), 3)
        pack(store.layout, store.records, {n: torch.randn(3, *s) * 0.1 for n, s in store.layout.shapes().items()})
        for tokens in (1, 3, 21):
            ids = np.tile([0, 2], (tokens, 1))
            routes = build_routes(ids, np.full((tokens, 2), 0.5, np.float32), 3)
            x, out = torch.randn(tokens, 147), torch.zeros(tokens, 147)
            executor.run(store, x, routes, out)
            exact = torch.zeros(tokens, 147, dtype=torch.float64)
            reference.moe_forward(spec, [store.weights(int(e)) for e in routes.experts], x, routes, exact)
            bound = {"int8": 2e-4, "int4": 0.03}.get(format, 1e-5)  # int4: activations in 8 bits
            torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)
    assembly = entry.compiled._library.get_asm_str()
    assert "vpdpbusd" not in assembly
    print(*(register for register in ("xmm", "ymm", "zmm") if "%" + register in assembly))
executor.close()
"""


@x86
@pytest.mark.slow
@pytest.mark.parametrize(("level", "registers"), [("portable", "xmm"), ("avx2", "xmm ymm"), ("avx512", "xmm ymm zmm")])
def test_a_level_computes_the_same_with_its_own_instructions_only(
    level: str, registers: str, tmp_path: Path, run_python: RunPython
) -> None:
    """Bug: an illegal instruction, or a library function that is not there, on a processor nobody tried."""
    levels = list(isa._LEVELS)
    needed = [f for name in levels[: levels.index(level) + 1] for f in isa._LEVELS[name][1]]
    if not all(isa.llvmlite.binding.get_host_cpu_features().get(feature) for feature in needed):
        pytest.skip(f"this processor has no {level}")
    done = run_python(_CHECK, cwd=_ROOT, path=(_ROOT,), MOEBIUS_ISA=level, MOEBIUS_CACHE_DIR=str(tmp_path))
    assert done.stdout.split("\n")[:4] == [registers] * 4


@x86
def test_a_level_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a forced level crashes with an illegal instruction instead of a message."""
    monkeypatch.setenv("MOEBIUS_ISA", "avx512")
    monkeypatch.setattr(isa.llvmlite.binding, "get_host_cpu_features", lambda: {"avx2": True})
    with pytest.raises(RuntimeError, match="avx512f"):
        isa.apply_choice()


@x86
def test_an_unknown_level_is_refused_and_a_late_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a misspelt or a late choice is silently ignored, and a test believes it tested another level."""
    monkeypatch.setenv("MOEBIUS_ISA", "avx1024")
    with pytest.raises(ValueError, match="portable, avx2, avx512"):
        isa.apply_choice()
    assert find_range_error.compiled  # from here on Numba compiles for one processor
    before = isa._config.CPU_NAME, isa._config.CPU_FEATURES
    monkeypatch.setenv("MOEBIUS_ISA", "portable")
    with pytest.raises(RuntimeError, match="too late"):
        isa.apply_choice()
    assert before == (isa._config.CPU_NAME, isa._config.CPU_FEATURES)
