"""AMX tiles: the kernels' logic on emulated ones, and the instructions that processors with real ones get."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.kernels.numba import isa

_ROOT = Path(__file__).parents[3]
RunPython = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX belongs to x86-64")


@pytest.mark.slow
def test_layers_in_emulated_tiles(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: any in blocking, edges, packing, odd sizes, or the order in which tiles are configured and released."""
    code = f"import runpy; runpy.run_path({str(Path(__file__).with_name('tiled_layers.py'))!r}, run_name='__main__')"
    done = run_python(code, cwd=_ROOT, path=(_ROOT,), MOEBIUS_CACHE_DIR=str(tmp_path))
    assert len(done.stdout.split()) == 5


_COMPILE = """
from moebius.kernels.numba import isa, work
isa._chosen, isa.tiles_granted = lambda: "amx", lambda: True
assert isa.has_tiles()
print(work.work_bf16.compiled._library.get_asm_str())
"""


@pytest.mark.slow
def test_processors_with_tiles_get_their_instructions(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: an operand that LLVM refuses, a tile number out of range, or code that never reaches the tiles."""
    features = ",".join(f"+{feature}" for feature in isa._features("amx"))
    env = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features, "MOEBIUS_CACHE_DIR": str(tmp_path)}
    done = run_python(_COMPILE, cwd=_ROOT, path=(_ROOT,), **env)
    for name in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert re.search(rf"\b{name}\b", done.stdout), f"no {name}"
    products = set(re.findall(r"tdpbf16ps\t%tmm(\d), %tmm(\d), %tmm(\d)", done.stdout))
    assert {total for _, _, total in products} == {"0", "1", "2", "3"}  # operands in the order of the assembler
    assert {left for _, left, _ in products} == {"4"}


def test_tiles_that_the_system_refuses_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a processor with AMX under a system, or a sandbox, that does not grant it: an illegal instruction."""
    monkeypatch.setattr(isa, "has_feature", lambda name: True)
    monkeypatch.setenv("MOEBIUS_ISA", "amx")
    monkeypatch.setattr(isa, "tiles_granted", lambda: True)
    assert isa.has_tiles()
    monkeypatch.setattr(isa, "tiles_granted", lambda: False)
    assert not isa.has_tiles()
    features = dict.fromkeys(isa._features("amx"), True)
    monkeypatch.setattr(isa.llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert isa.levels() == ["portable", "avx2", "avx512"]
    with pytest.raises(RuntimeError, match=r"permission.*portable, avx2, avx512"):
        isa.apply_choice()


def test_tiles_are_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what never ran on hardware becomes what everybody with such a processor gets."""
    monkeypatch.setattr(isa, "has_feature", lambda name: True)
    monkeypatch.setattr(isa, "tiles_granted", lambda: True)
    monkeypatch.delenv("MOEBIUS_ISA", raising=False)
    assert not isa.has_tiles()
