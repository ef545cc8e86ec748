"""The instruction set that kernels are compiled for: the processor's own, or a lower one for tests.

``MOEBIUS_ISA=portable|avx2|avx512|amx`` limits all of this process's Numba code; set it before Numba compiles. Tiles
(amx) are used only where they are asked for by name, until they have been seen to work on a processor that has them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from typing import Any

import llvmlite.binding
import numba
from numba.core.registry import cpu_target

_TILES = ("amx-tile", "amx-bf16", "amx-int8")
# LLVM's name of a processor, and the features that the level adds to the ones below it.
_LEVELS = {
    "portable": ("x86-64", ()),
    "avx2": ("x86-64-v3", ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt")),
    "avx512": ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    # Every processor with tiles has products of bytes and of bf16 in vectors too, which decoding uses.
    "amx": ("x86-64-v4", ("avx512vnni", "avx512bf16", *_TILES)),
}
_config: Any = numba.core.config

# Linux hands the tiles' registers out on request: the number of the system call arch_prctl, the request, and which part
# of the processor's state is meant (Documentation/arch/x86/xstate.rst).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


_refusal: str | None = None


def take_choice() -> None:
    """As `apply_choice`, at import; what it raises is kept for `check_choice`, since importing has to succeed."""
    global _refusal
    try:
        apply_choice()
    except (ValueError, RuntimeError) as error:
        _refusal = str(error)


def refusal() -> str | None:
    """Why the level in MOEBIUS_ISA cannot be used, or None."""
    return _refusal


def check_choice() -> None:
    """Raise RuntimeError if the level in MOEBIUS_ISA cannot be used."""
    if _refusal is not None:
        raise RuntimeError(_refusal)


def apply_choice() -> None:
    """Limit Numba to the level in MOEBIUS_ISA, if there is one.

    Raises:
        ValueError: no such level on this architecture.
        RuntimeError: the processor or the system lacks it, or Numba has already begun to compile for another.
    """
    level = _chosen()
    if level is None:
        return
    if not is_x86():
        if level != "portable":
            raise ValueError(f"MOEBIUS_ISA={level} does not exist on {platform.machine()}; only portable does")
        return
    if level not in _LEVELS:
        raise ValueError(f"MOEBIUS_ISA={level} is unknown; choose one of {', '.join(levels())}, or leave it unset")
    if missing := _missing(level):
        raise RuntimeError(
            f"MOEBIUS_ISA={level} needs {', '.join(missing)}, which this machine does not have; choose one of "
            f"{', '.join(levels())}, or leave it unset"
        )
    _limit(level)


def levels() -> list[str]:
    """The levels that MOEBIUS_ISA may name on this machine."""
    return [level for level in _LEVELS if not _missing(level)] if is_x86() else ["portable"]


def has_tiles() -> bool:
    """Whether code is compiled for AMX: asked for by name, and the system has granted the tiles to this process."""
    return _chosen() == "amx" and all(has_feature(name) for name in _TILES) and tiles_granted()


def _chosen() -> str | None:
    return os.environ.get("MOEBIUS_ISA") or None


def has_feature(name: str) -> bool:
    """Whether code is compiled for a processor with LLVM's feature `name`."""
    return f"+{name}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


@cache
def tiles_granted() -> bool:
    """Ask the system for the tiles' registers, for all threads of this process; it saves them from then on."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _features(level: str) -> list[str]:
    names = list(_LEVELS)[: list(_LEVELS).index(level) + 1]
    return [feature for name in names for feature in _LEVELS[name][1]]


def _missing(level: str) -> list[str]:
    host = llvmlite.binding.get_host_cpu_features()
    missing = [feature for feature in _features(level) if not host.get(feature)]
    if level == "amx" and not missing and not tiles_granted():
        missing.append("the system's permission to use tiles")
    return missing


def _limit(level: str) -> None:
    before = _config.CPU_NAME, _config.CPU_FEATURES
    chosen = _LEVELS[level][0], ",".join(f"+{feature}" for feature in _features(level))
    _config.CPU_NAME, _config.CPU_FEATURES = chosen
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    if (name, features) != chosen:
        _config.CPU_NAME, _config.CPU_FEATURES = before
        raise RuntimeError(
            f"MOEBIUS_ISA={level} comes too late: Numba already compiles for {name}; set it, and import moebius, "
            "before other code that uses Numba"
        )
