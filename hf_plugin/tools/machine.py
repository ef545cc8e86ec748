"""Facts about the machine that cost nothing to read: its processor, its caches, its memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "neon", "asimd", "sve", "bf16", "i8mm"),
)
_CACHES = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Cache:
    """One level of the processor's data caches; `instances` are shared by different groups of cores."""

    level: int
    bytes_each: int
    instances: int

    @property
    def total_bytes(self) -> int:
        return self.bytes_each * self.instances


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor as this process may use it; cores count the machine's, `usable` those of the affinity mask."""

    model: str
    instruction_sets: list[str]
    physical_cores: int
    logical_cores: int
    usable_cores: int
    caches: list[Cache]

    @property
    def last_level_bytes(self) -> int | None:
        """All instances of the last cache level together, or None where the system does not tell."""
        return max(self.caches, key=lambda cache: cache.level).total_bytes if self.caches else None


def cpu() -> Cpu:
    """Read the processor's facts; what the system does not tell stays empty."""
    info = _cpuinfo()
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    flags = set(info.get("flags", info.get("Features", "")).split())
    return Cpu(
        model=info.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=[name for name in INSTRUCTION_SETS if name in flags],
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=usable,
        caches=_data_caches(),
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty on other systems."""
    if not _CPUINFO.is_file():
        return {}
    first = _CPUINFO.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _data_caches() -> list[Cache]:
    """Data and unified caches by level, each shared group of cores counted once."""
    groups: dict[int, dict[str, int]] = {}
    for folder in sorted(_CACHES.glob("cpu[0-9]*/cache/index[0-9]*")):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:  # some hypervisors leave files out
            continue
        if kind != "Instruction":
            groups.setdefault(int(level), {})[shared] = _parse_size(size)
    return [Cache(level, max(sizes.values()), len(sizes)) for level, sizes in sorted(groups.items())]


def _parse_size(text: str) -> int:
    """Bytes of sysfs sizes such as "32768K"."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def compiled_isa() -> str:
    """The widest vector instructions that Numba compiles for: "amx", "avx512", "avx2", "avx", or the architecture.

    That is less than the processor has where NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say so.
    """
    from numba.core.registry import cpu_target

    from moebius.kernels.numba.isa import has_tiles

    if has_tiles():
        return "amx"
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = set(features.split(","))
    for flag, name in (("+avx512f", "avx512"), ("+avx2", "avx2"), ("+avx", "avx"), ("+sve", "sve"), ("+neon", "neon")):
        if flag in enabled:
            return name
    return platform.machine()
