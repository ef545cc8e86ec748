"""Looks at the machine and says what Moebius will use on it, what it falls back to, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from packaging.version import Version

from moebius import __version__
from moebius.gpu_cache.device import default_device
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.executor import HOW_TO_INSTALL
from moebius.hf_plugin.running.expert_files import CachedFile, cached_files
from moebius.hf_plugin.tools import machine
from moebius.hf_plugin.tools.memory_read import read_bandwidth
from moebius.kernels.numba import isa
from moebius.kernels.numba.jit import cache_folder

OLDEST_TRANSFORMERS = "5.17"
PACKAGES = ("torch", "transformers", "accelerate", "triton", "numba", "llvmlite", "numpy", "safetensors", "kernels")


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether something can be used, and the reason either way."""

    usable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory in bytes, and the measured speed of reading it with `threads` threads (GB/s of 1e9 bytes).

    The speed is None where nothing can be compiled, see `isa.refusal`.
    """

    total_bytes: int
    available_bytes: int
    read_gbytes_per_s: float | None
    threads: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator that can hold a cache; `capability` is CUDA's, "" elsewhere."""

    device: str
    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class KernelCache:
    """Where Numba keeps compiled kernels between runs; `folder` is None where no folder can be written."""

    folder: str | None
    writable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Component:
    """What one part of Moebius will use here; `fallback` marks a slower way than the best it has."""

    component: str
    used: str
    fallback: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `moebius doctor` prints."""

    versions: dict[str, str | None]
    cpu: machine.Cpu
    memory: Memory
    gpus: list[Gpu]
    triton: Finding
    pinned_memory: Finding
    transformers: Finding
    kernel_cache: KernelCache
    expert_cache: list[CachedFile]
    plan: list[Component]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and numbers."""
        return asdict(self)


def examine(progress: Callable[[str, float], None] = lambda _step, _done: None) -> Report:
    """Examine this machine; takes about two seconds, most of it for measuring the memory.

    Args:
        progress: called as each step begins, with its name and the fraction done of the whole.
    """
    progress("processor", 0.0)
    cpu = machine.cpu()
    progress("memory bandwidth", 0.1)
    memory = measure_memory(cpu)
    progress("GPU and Triton", 0.5)
    gpus = find_gpus()
    triton, pinned, transformers = check_triton(gpus), check_pinned_memory(gpus), check_transformers()
    progress("kernel cache", 0.9)
    cache = find_kernel_cache()
    plan = make_plan(cpu, gpus, triton, pinned, transformers, cache)
    return Report(versions(), cpu, memory, gpus, triton, pinned, transformers, cache, cached_files(), plan)


def versions() -> dict[str, str | None]:
    """Versions of Python, Moebius and the packages below it; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "moebius": __version__}
    found |= {name: _version(name) for name in PACKAGES}
    if found["triton"] is None:  # builds for other systems and accelerators have names of their own
        names = importlib.metadata.packages_distributions().get("triton", [])
        found["triton"] = next((f"{_version(name)} ({name})" for name in names), None)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_memory(cpu: machine.Cpu) -> Memory:
    """Host memory and the speed of reading it from all physical cores that this process may use."""
    threads = min(cpu.physical_cores, cpu.usable_cores)
    host = psutil.virtual_memory()
    speed = None if isa.refusal() else round(read_bandwidth(threads, cpu.last_level_bytes), 2)
    return Memory(host.total, host.available, speed, threads)


def find_gpus() -> list[Gpu]:
    """The accelerators that torch can use and that can hold a cache."""
    kind = default_device()
    return (
        [] if kind == "cpu" else [_gpu(torch.device(kind, index)) for index in range(torch.accelerator.device_count())]
    )


def _gpu(device: torch.device) -> Gpu:
    module = torch.get_device_module(device)
    facts = module.get_device_properties(device)
    free, total = module.mem_get_info(device)
    capability = f"{facts.major}.{facts.minor}" if hasattr(facts, "major") else ""
    return Gpu(str(device), facts.name, capability, total, free)


def check_triton(gpus: list[Gpu]) -> Finding:
    """Whether Triton kernels can run: on a GPU, or in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return Finding(False, f"Triton is not installed ({HOW_TO_INSTALL})")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding(True, "TRITON_INTERPRET=1: kernels run in Triton's interpreter on the CPU, slowly")
    if not gpus:
        return Finding(False, "Triton needs a GPU that torch can use")
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:
        return Finding(False, f"Triton finds no active driver: {error}")
    return Finding(True, f"compiles for {target.backend} {target.arch}")


def check_pinned_memory(gpus: list[Gpu]) -> Finding:
    """Whether host memory can be pinned in place, as the experts' is for fast copies to the GPU."""
    if not gpus:
        return Finding(False, "pinning needs a GPU")
    driver, host = Driver(torch.device(gpus[0].device)), torch.empty(1 << 20, dtype=torch.uint8)
    refusal = driver.register(host)
    if refusal is None:
        driver.unregister(host)
        return Finding(True, "1 MiB was pinned in place")
    try:
        driver.pinned(1 << 20)
    except RuntimeError as error:
        return Finding(False, f"{refusal}, and no pinned memory was to be had: {error}")
    return Finding(False, f"{refusal}; memory that is allocated pinned was to be had")


def check_transformers() -> Finding:
    """Whether the installed transformers is one that Moebius supports."""
    found = _version("transformers")
    if found is None:
        return Finding(False, "transformers is not installed (pip install transformers)")
    if Version(found) < Version(OLDEST_TRANSFORMERS):
        return Finding(False, f"{found} is older than {OLDEST_TRANSFORMERS} (pip install -U transformers)")
    return Finding(True, f"{found} is {OLDEST_TRANSFORMERS} or newer")


def find_kernel_cache() -> KernelCache:
    """The folder in which compiled kernels survive between runs."""
    folder = cache_folder()
    if folder is None:
        return KernelCache(None, False, "no folder can be written, so every process compiles (set MOEBIUS_CACHE_DIR)")
    return KernelCache(str(folder), True, "compiled once for these sources, versions and instructions")


def make_plan(
    cpu: machine.Cpu,
    gpus: list[Gpu],
    triton: Finding,
    pinned: Finding,
    transformers: Finding,
    cache: KernelCache,
) -> list[Component]:
    """What each part will use with default options, and why."""
    return [
        _plan_transformers(transformers),
        _plan_cpu_experts(min(cpu.physical_cores, cpu.usable_cores)),
        Component("compiled CPU kernels", cache.folder or "memory", not cache.writable, cache.reason),
        _plan_gpu_cache(gpus, triton),
        _plan_uploads(gpus, pinned),
        *([_plan_tiles(gpus[0].name)] if gpus and triton.usable else []),
    ]


def _plan_cpu_experts(threads: int) -> Component:
    name, reason = "experts on the CPU", isa.refusal()
    if reason is not None:
        return Component(name, "nothing: patch raises", True, reason)
    reason = (
        f"one thread for each physical core that this process may use; compiled for {machine.compiled_isa()}, and "
        f"MOEBIUS_ISA may name {', '.join(isa.levels())}"
    )
    return Component(name, f"Numba, {threads} threads", False, reason)


def _plan_transformers(transformers: Finding) -> Component:
    used = "the experts modules of its models" if transformers.usable else "nothing: patch raises"
    return Component("transformers", used, not transformers.usable, transformers.reason)


def _plan_gpu_cache(gpus: list[Gpu], triton: Finding) -> Component:
    name = "experts on the GPU"
    if not gpus:
        return Component(name, "none: all experts run on the CPU", True, f"no GPU: {_why_no_gpu()}")
    if not triton.usable:
        return Component(name, "nothing: patch raises, but with device='cpu'", True, triton.reason)
    return Component(name, f"cache on {gpus[0].device} ({gpus[0].name}), Triton", False, triton.reason)


def _plan_uploads(gpus: list[Gpu], pinned: Finding) -> Component:
    if not gpus:
        return Component("uploads of experts", "none", True, "there is no GPU to upload to")
    used = "copies from pinned memory" if pinned.usable else "copies through a few pinned buffers, with a thread"
    return Component("uploads of experts", used, not pinned.usable, pinned.reason)


def _plan_tiles(device: str) -> Component:
    from moebius.kernels.triton.choice import tuned  # here, because Triton may not be installed

    name, kinds = "tiles of the Triton kernels", sorted(tuned(device))
    if not kinds:
        return Component(name, "built in", True, f"nothing was tuned on {device}: moebius warmup MODEL does it")
    return Component(
        name, f"tuned for {len(kinds)} kinds of layers and calls", False, f"on {device}: {', '.join(kinds)}"
    )


def _why_no_gpu() -> str:
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return f"torch {torch.__version__} is built for no accelerator"
    return f"torch {torch.__version__} finds no {built_for.type} device that can hold a cache"
