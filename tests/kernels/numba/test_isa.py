"""Every instruction set gives the same mathematics, and never an instruction beyond it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.kernels.numba import isa
from moebius.kernels.numba.jobs import find_range_error

_ROOT = Path(__file__).parents[3]
RunPython = Callable[..., subprocess.CompletedProcess[str]]
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")

# Formats of each kind, odd sizes, one, few and many tokens per expert, numbers that are none; then the assembly of all
# that takes part. Intermediates in bf16 and activations in 8 bits, beside int4, are coarser than the rest.
_CHECK = """
import sys, numpy as np, torch
from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.experts import Act, Activation, ExpertSpec, RecordLayout
from moebius.kernels.numba import crew, jit, jobs, quantizer, routing, work
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes
executor, torch_seed = CpuExecutor(2), torch.manual_seed(0)
entries = {"bf16": work.work_bf16, "fp16": work.work_fp16, "int8": work.work_rounding_int8,
           "int4": work.work_rounding_int4, "fp8": work.work_e4m3, "mxfp4": work.work_mxfp4}
def check(store, tokens, dtype):
    ids = np.tile([0, 2], (tokens, 1))
    routes = build_routes(ids, np.full((tokens, 2), 0.5, np.float32), 3)
    x, out = torch.randn(tokens, 147).to(dtype), torch.zeros(tokens, 147)
    if tokens > 1:
        x[0, 3], x[1, 5] = float("nan"), float("inf")
    executor.run(store, x, routes, out)
    exact = torch.zeros(tokens, 147, dtype=torch.float64)
    reference.moe_forward(store.spec, [store.weights(int(e)) for e in routes.experts], x, routes, exact)
    rounds = dtype == torch.bfloat16 and store.layout.format != "fp16"
    bound = 0.03 if rounds else {"int8": 2e-4, "int4": 0.03}.get(store.layout.format, 1e-5)
    assert torch.isfinite(out[2:]).all() and not torch.isfinite(out[:2 if tokens > 1 else 0]).any()
    rest = slice(2 if tokens > 1 else 0, None)
    torch.testing.assert_close(out[rest].double(), exact[rest], rtol=bound, atol=bound)
for format, entry in entries.items():
    for kind in (Act.SILU, Act.GELU_ERF):
        spec = ExpertSpec(147, 83, biased=True, activation=Activation(kind))
        store = ExpertStore.empty(spec, RecordLayout.of(spec, format), 3)
        pack(store.layout, store.records, {n: torch.randn(3, *s) * 0.1 for n, s in store.layout.shapes().items()})
        for tokens in (1, 3, 21):
            for dtype in (torch.float32, torch.bfloat16):
                check(store, tokens, dtype)
    print("--------", format)
    print(entry.compiled._library.get_asm_str())
executor.close()
print("-------- rest")
for module in (crew, jobs, quantizer, routing):
    for entry in [value for value in vars(module).values() if isinstance(value, jit.Entry) and not value.callback]:
        print(*entry.compiled.inspect_asm().values(), sep="")
"""
_REGISTERS = {"portable": "xmm", "avx2": "xmm ymm", "avx512": "xmm ymm zmm", "amx": "xmm ymm zmm"}
_UNSEEN = pytest.mark.xfail(strict=False, reason="tiles have never run on a processor that has them")
_LEVELS = [pytest.param(level, marks=_UNSEEN if level == "amx" else ()) for level in _REGISTERS]
# What a level must not have: the encodings of AVX and later, and instructions that came with them, beside registers.
_FORBIDDEN = {
    "portable": r"\tv[a-z]|\t(andn|bextr|bls\w+|mulx|rorx|s[ah][lr]x|pdep|pext|popcnt|lzcnt)[lq]?\t|\t(pshufb|pmulld)",
    "avx2": r"%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]|vpdp|vdpbf16ps",
    "avx512": r"vpdp|vdpbf16ps|tmm",
    "amx": r"vpdpws",
}


@x86
@pytest.mark.slow
@pytest.mark.parametrize("level", _LEVELS)
def test_a_level_computes_the_same_with_its_own_instructions_only(
    level: str, tmp_path: Path, run_python: RunPython
) -> None:
    """Bug: an illegal instruction, or a library function that is not there, on a processor nobody tried."""
    if level not in isa.levels():
        pytest.skip(f"this machine has no {level}")
    done = run_python(_CHECK, cwd=_ROOT, path=(_ROOT,), MOEBIUS_ISA=level, MOEBIUS_CACHE_DIR=str(tmp_path))
    parts = dict(part.split("\n", 1) for part in done.stdout.split("-------- ")[1:])
    assert list(parts) == ["bf16", "fp16", "int8", "int4", "fp8", "mxfp4", "rest"]
    for name, assembly in parts.items():
        assert not (found := re.search(_FORBIDDEN[level], assembly)), f"{name}: {found}"
        registers = [register for register in ("xmm", "ymm", "zmm") if f"%{register}" in assembly]
        assert (
            registers == _REGISTERS[level].split() if name != "rest" else set(registers) <= {*_REGISTERS[level].split()}
        )
    assert ("tdpbf16ps" in parts["bf16"]) == (level == "amx")


@x86
def test_a_level_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a forced level crashes with an illegal instruction instead of a message."""
    monkeypatch.setenv("MOEBIUS_ISA", "avx512")
    monkeypatch.setattr(isa.llvmlite.binding, "get_host_cpu_features", lambda: {"avx2": True})
    with pytest.raises(RuntimeError, match=r"avx512f.* choose one of portable, or leave"):
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
