"""The instruction set that kernels are compiled for: the processor's own, or a lower one for tests.

``MOEBIUS_ISA=portable|avx2|avx512`` limits all of this process's Numba code; it has to be set before Numba compiles.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import llvmlite.binding
import numba
from numba.core.registry import cpu_target

# LLVM's name of a processor, and the features that the level adds to the ones below it.
_LEVELS = {
    "portable": ("x86-64", ()),
    "avx2": ("x86-64-v3", ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt")),
    "avx512": ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
}
_config: Any = numba.core.config


def apply_choice() -> None:
    """Limit Numba to the level in MOEBIUS_ISA, if there is one.

    Raises:
        ValueError: no such level on this architecture.
        RuntimeError: the processor lacks it, or Numba has already begun to compile for another.
    """
    level = os.environ.get("MOEBIUS_ISA")
    if not level:
        return
    if platform.machine() not in ("x86_64", "AMD64"):
        if level != "portable":
            raise ValueError(f"MOEBIUS_ISA={level} does not exist on {platform.machine()}; only portable does")
        return
    if level not in _LEVELS:
        raise ValueError(f"MOEBIUS_ISA={level} is unknown; choose one of {', '.join(_LEVELS)}, or leave it unset")
    _limit(level)


def _limit(level: str) -> None:
    names = list(_LEVELS)[: list(_LEVELS).index(level) + 1]
    needed = [feature for name in names for feature in _LEVELS[name][1]]
    host = llvmlite.binding.get_host_cpu_features()
    missing = [feature for feature in needed if not host.get(feature)]
    if missing:
        raise RuntimeError(f"MOEBIUS_ISA={level} needs {', '.join(missing)}, which this processor does not have")
    before = _config.CPU_NAME, _config.CPU_FEATURES
    chosen = _LEVELS[level][0], ",".join(f"+{feature}" for feature in needed)
    _config.CPU_NAME, _config.CPU_FEATURES = chosen
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    if (name, features) != chosen:
        _config.CPU_NAME, _config.CPU_FEATURES = before
        raise RuntimeError(
            f"MOEBIUS_ISA={level} comes too late: Numba already compiles for {name}; set it, and import moebius, "
            "before other code that uses Numba"
        )


def has_feature(name: str) -> bool:
    """Whether code is compiled for a processor with LLVM's feature `name`."""
    return f"+{name}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
