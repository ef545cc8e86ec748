"""The report of `moebius doctor`: facts read rightly, and fallbacks said with their reasons."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebius.gpu_cache.driver import Driver
from moebius.hf_plugin.tools import doctor, machine, memory_read
from moebius.kernels.numba import jit

ROOT = Path(__file__).resolve().parents[2]


def write_cache(cpus: Path, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    facts = {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}
    for name, text in facts.items():
        (folder / name).write_text(text + "\n")


def test_every_instance_of_a_cache_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting per core, or one instance only, would make the bench's buffers far too large or fit the cache."""
    for cpu in range(8):
        first = cpu // 4 * 4
        write_cache(tmp_path, cpu, 0, 1, "Data", "32K", str(cpu))
        write_cache(tmp_path, cpu, 1, 1, "Instruction", "32K", str(cpu))
        write_cache(tmp_path, cpu, 3, 3, "Unified", "16M", f"{first}-{first + 3}")
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    found = machine.cpu()
    assert found.caches == [machine.Cache(1, 32 << 10, 8), machine.Cache(3, 16 << 20, 2)]
    assert found.last_level_bytes == 32 << 20


def test_a_machine_that_tells_nothing_is_still_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and other systems hide /proc and /sys: the report must not fail there."""
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "none")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    found = machine.cpu()
    assert found.caches == []
    assert found.last_level_bytes is None
    assert found.model
    assert found.instruction_sets == []
    assert found.physical_cores >= 1


@pytest.mark.parametrize(("text", "size"), [("48K", 48 << 10), ("2M", 2 << 20), ("1G", 1 << 30), ("512", 512)])
def test_cache_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert machine._parse_size(text) == size


def test_compiled_isa_is_what_numba_compiles_for(run_python: Callable, tmp_path: Path) -> None:
    """Read from the processor's flags, it would claim avx512 for code that was compiled for a plain machine."""
    code = "from moebius.hf_plugin.tools.machine import compiled_isa; print(compiled_isa())"
    name = run_python(code, cwd=tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="").stdout.strip()
    assert name not in ("avx512", "avx2", "avx")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_plain_read_reads_every_word_once(threads: int) -> None:
    """A read that skips words would be too fast, and every kernel compared with it too slow."""
    records = np.random.default_rng(0).integers(0, 1 << 60, (5, 10008), np.uint64)
    rows = np.array([4, 0, 2, 2])
    with memory_read.RecordReader(threads) as reader:
        seconds, total = reader.read(records, rows)
    assert seconds > 0
    assert total == int(records[rows].view(np.uint32).sum(dtype=np.uint64)) % (1 << 32)


@pytest.fixture
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth measurement on a small buffer."""
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, _: memory_read.read_bandwidth(threads, 1 << 20, 1))


@pytest.mark.usefixtures("quick_memory")
def test_report_is_whole_and_plain_data() -> None:
    """A dataclass, a Path or a numpy number left inside would break --json."""
    steps: list[float] = []
    report = doctor.examine(lambda _step, done: steps.append(done))
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert steps == sorted(steps)
    assert document["versions"]["torch"]
    assert document["memory"]["read_gbytes_per_s"] > 0
    assert 0 < document["memory"]["available_bytes"] <= document["memory"]["total_bytes"]
    assert {part["component"] for part in document["plan"]} >= {"experts on the CPU", "experts on the GPU"}
    assert all(part["reason"] for part in document["plan"])


@pytest.mark.usefixtures("quick_memory")
def test_without_a_gpu_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent fallback to the CPU is what a user asks the doctor about."""
    monkeypatch.setattr(doctor, "default_device", lambda: "cpu")
    report = doctor.examine()
    parts = {part.component: part for part in report.plan}
    assert parts["experts on the GPU"].fallback
    assert "no GPU" in parts["experts on the GPU"].reason
    assert parts["uploads of experts"].fallback
    assert not report.pinned_memory.usable
    assert report.gpus == []


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two accelerators that are not CUDA's."""
    module = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(name=f"Arc {device.index}"),
        mem_get_info=lambda device: (3 << 30, 12 << 30),
        Stream=object,
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)


@pytest.mark.usefixtures("xpu")
def test_other_accelerators_than_cuda_are_found() -> None:
    """Catches questions that only torch.cuda answers."""
    gpus = doctor.find_gpus()
    assert gpus == [doctor.Gpu(f"xpu:{i}", f"Arc {i}", "", 12 << 30, 3 << 30) for i in range(2)]
    assert doctor._plan_gpu_cache(gpus, doctor.Finding(True, "")).used == "cache on xpu:0 (Arc 0), Triton"


@pytest.mark.usefixtures("xpu")
def test_refused_pinning_and_the_detour_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "yes" for memory that is allocated pinned, where the experts' own pages are refused."""
    gpus = doctor.find_gpus()
    monkeypatch.setattr(Driver, "pinned", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    found = doctor.check_pinned_memory(gpus)
    assert found == doctor.Finding(
        False, "torch registers no host memory for xpu; memory that is allocated pinned was to be had"
    )
    assert doctor._plan_uploads(gpus, found).used == "copies through a few pinned buffers, with a thread"

    def refuse(driver: Driver, nbytes: int) -> torch.Tensor:
        raise RuntimeError("no more")

    monkeypatch.setattr(Driver, "pinned", refuse)
    assert "no pinned memory was to be had: no more" in doctor.check_pinned_memory(gpus).reason
    monkeypatch.setattr(Driver, "register", lambda self, host: None)
    monkeypatch.setattr(Driver, "unregister", lambda self, host: None)
    assert doctor.check_pinned_memory(gpus).usable


def test_triton_is_usable_without_a_gpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not doctor.check_triton([]).usable
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.check_triton([]).usable


@pytest.mark.parametrize(
    ("version", "usable"), [("5.16.9", False), ("5.17.0", True), ("5.23.0", True), ("6.0", True), (None, False)]
)
def test_transformers_range(version: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared as text, 5.9 would be newer than 5.17."""
    monkeypatch.setattr(doctor, "_version", lambda _: version)
    finding = doctor.check_transformers()
    assert finding.usable is usable
    assert doctor._plan_transformers(finding).fallback is not usable


def test_transformers_range_is_the_packages_own() -> None:
    """The doctor and pip must not disagree about what is supported."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={doctor.OLDEST_TRANSFORMERS}" in dependencies


def test_kernel_cache_follows_the_kernels_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path)
    assert doctor.find_kernel_cache() == doctor.KernelCache(str(tmp_path), True, doctor.find_kernel_cache().reason)


def test_unwritable_kernel_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling again in every process costs seconds: the user has to be told why, and what to set."""
    (tmp_path / "file").write_text("a file, where a folder is needed")
    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "cache_folder", jit.cache_folder.__wrapped__)
    found = doctor.find_kernel_cache()
    assert found.folder is None
    assert not found.writable
    assert "MOEBIUS_CACHE_DIR" in found.reason
