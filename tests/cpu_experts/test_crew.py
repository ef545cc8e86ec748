"""Worker threads: complete, interruptible, survivable by fork and by exit."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.cpu_experts import crew as crew_module
from moebius.cpu_experts import team
from moebius.cpu_experts.crew import Crew, ResidentCrew, WaitingCrew, make_crew
from moebius.cpu_experts.executor import CpuExecutor
from moebius.kernels.experts import ExpertSpec
from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import atomic_add, atomic_load, peek, poke, wait_briefly

from .moe_layers import random_routes, random_store

_ROOT = Path(__file__).parents[2]
RunPython = Callable[..., subprocess.CompletedProcess[str]]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

UNITS = 1000


@entry("void(int64)", callback=True)
def count_units(job):  # type: ignore[no-untyped-def]
    """Words: 0 the next unit, 8 on how often each unit was taken."""
    while True:
        unit = atomic_add(job, 1)
        if unit >= UNITS:
            return
        place = job + 8 * (8 + unit)
        poke(place, peek(place, np.int64(0)) + 1)


@pytest.fixture(params=[pytest.param(ResidentCrew, marks=linux), WaitingCrew])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    made = request.param()
    yield made
    made.close()


def test_every_unit_is_computed_once_and_before_run_returns(crew: Crew) -> None:
    """Bug: a worker that wakes late works on the next job's memory, or is not waited for."""
    for _ in range(300):
        job = np.zeros(8 + UNITS, np.int64)
        crew.run(count_units.address, job.ctypes.data, 3)
        assert (job[8:] == 1).all()


def test_close_ends_workers_and_run_starts_them_again(crew: Crew) -> None:
    """Bug: close leaves a sleeper behind; a second close hangs; a crew is dead after close."""
    before = {thread.name for thread in threading.enumerate()}
    for _ in range(3):
        job = np.zeros(8 + UNITS, np.int64)
        crew.run(count_units.address, job.ctypes.data, 3)
        assert (job[8:] == 1).all()
        assert threading.active_count() > len(before)
        crew.close()
        crew.close()
        assert {thread.name for thread in threading.enumerate()} == before


@entry("void(int64)", callback=True)
def count_threads(job):  # type: ignore[no-untyped-def]
    """Words: 0 how many threads came, which then wait for word 8 to become as large."""
    atomic_add(job, 1)
    waited = 0
    while atomic_load(job) < peek(job + 64, np.int64(0)):
        waited = wait_briefly(waited)


def test_jobs_for_more_and_for_fewer_workers_alternate(crew: Crew) -> None:
    """Bug: a job for two threads is computed by five, or workers that sat one out miss the next (a hang)."""
    for workers in (1, 4, 2, 0, 4, 1, 3) * 20:
        job = np.zeros(16, np.int64)
        job[8] = workers + 1
        crew.run(count_threads.address, job.ctypes.data, workers)
        assert job[0] == workers + 1


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@linux
def test_torch_threads_work_on_a_job_of_their_number(torch_threads: Callable[[int], None]) -> None:
    """Bug: a team of another size works on it; units are lost; threads of ours start beside torch's."""
    for threads in (2, 3, 2):
        torch_threads(threads)
        job = np.zeros(16, np.int64)
        job[8] = threads
        assert team.run(count_threads.address, job.ctypes.data, threads - 1)
        assert job[0] == threads
    job = np.zeros(8 + UNITS, np.int64)
    assert not any(team.run(count_units.address, job.ctypes.data, workers) for workers in (0, 2, 5))
    assert not job.any()
    assert team.run(count_units.address, job.ctypes.data, 1)
    assert (job[8:] == 1).all()


@linux
def test_an_executor_beside_torch_takes_its_threads_and_has_the_same_result(
    torch_threads: Callable[[int], None],
) -> None:
    """Bug: the model's setting does not arrive, and threads compete; or the result depends on who computes it."""
    store, routes = random_store(ExpertSpec(300, 200), "bf16", 4), random_routes(3, 2, 4)
    x, before = torch.randn(3, 300), set(threading.enumerate())
    executors, results = [CpuExecutor(3), CpuExecutor(3, beside_torch=True)], [torch.zeros(3, 300) for _ in range(3)]
    torch_threads(3)
    executors[1].run(store, x, routes, results[1])
    assert set(threading.enumerate()) == before
    torch_threads(2)  # fewer than asked for: threads of ours
    executors[1].run(store, x, routes, results[2])
    assert len(set(threading.enumerate()) - before) == 2
    executors[0].run(store, x, routes, results[0])
    assert all(torch.equal(result, results[0]) for result in results)
    for executor in executors:
        executor.close()


def test_executors_share_threads_that_end_with_the_last() -> None:
    """Bug: every patched model brings threads of its own, or closing one takes the other's away."""
    before = set(threading.enumerate())
    first, second, third = CpuExecutor(3), CpuExecutor(2), CpuExecutor(4)
    store, routes = random_store(ExpertSpec(64, 48), "fp32", 4), random_routes(3, 2, 4)
    results = []
    for executor in (first, second, third, first):
        results.append(torch.zeros(3, 64))
        executor.run(store, torch.ones(3, 64), routes, results[-1])
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(set(threading.enumerate()) - before) == 3
    third.close()
    third.close()
    del first, executor
    second.run(store, torch.ones(3, 64), routes, results[0])
    second.close()
    assert set(threading.enumerate()) <= before


def test_forgotten_executor_gives_its_threads_back() -> None:
    """Bug: threads of a model that was deleted without unpatch live for ever."""
    before = set(threading.enumerate())
    executor = CpuExecutor(2)
    store, routes = random_store(ExpertSpec(8, 4), "fp32", 3), random_routes(4, 2, 3)
    executor.run(store, torch.ones(4, 8), routes, torch.zeros(4, 8))
    assert len(set(threading.enumerate()) - before) == 1
    del executor
    assert set(threading.enumerate()) <= before


def test_a_crew_of_the_caller_alone_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one thread means zero workers, and none is waited for."""
    for made in (make_crew(), WaitingCrew()):
        job = np.zeros(8 + UNITS, np.int64)
        made.run(count_units.address, job.ctypes.data, 0)
        assert (job[8:] == 1).all()


def test_systems_without_futex_get_the_other_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a Mac compiles a Linux system call."""
    monkeypatch.setattr(crew_module.sys, "platform", "darwin")
    assert isinstance(make_crew(), WaitingCrew)


@linux
def test_interrupts_leave_a_correct_executor() -> None:
    """Bug: Ctrl-C returns to the caller while workers still write, or leaves the lock taken."""
    executor = CpuExecutor(3)
    store, routes = random_store(ExpertSpec(300, 200), "bf16", 4), random_routes(3, 2, 4)
    x, plain = torch.randn(3, 300), torch.zeros(3, 300)
    executor.run(store, x, routes, plain)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the signal comes at any point of the loop)
                signal.setitimer(signal.ITIMER_REAL, 0.003)
                while True:
                    executor.run(store, x, routes, torch.zeros(3, 300))
            out = torch.zeros(3, 300)
            executor.run(store, x, routes, out)
            assert torch.equal(out, plain)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        executor.close()


_SETUP = """
import os, signal, sys, threading
import torch
from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import build_routes
import numpy as np
signal.alarm(120)
spec = ExpertSpec(64, 32)
store = ExpertStore.empty(spec, RecordLayout.of(spec, "fp32"), 2)
for expert in range(2):
    for part in store.weights(expert)[:3]:
        part.fill_(0.01)
torch.set_num_threads(3)
x, executor = torch.ones(2, 64), CpuExecutor(3, beside_torch=BESIDE_TORCH)
routes = build_routes(np.array([[0, 1], [1, 0]]), np.ones((2, 2), np.float32), 2)
def run():
    out = torch.zeros(2, 64)
    executor.run(store, x, routes, out)
    return out
plain = run()
"""


beside_torch = pytest.mark.parametrize("beside_torch", [False, True])


def _setup(beside_torch: bool) -> str:
    return f"BESIDE_TORCH = {beside_torch}{_SETUP}"


@linux
@beside_torch
def test_a_forked_child_computes_too(beside_torch: bool, run_python: RunPython) -> None:
    """Bug: the child waits for workers, or for a lock, that live in the parent only; so do those of OpenMP."""
    code = (
        _setup(beside_torch)
        + """
stop = False
def busy():
    while not stop:
        run()
other = threading.Thread(target=busy)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = torch.equal(run(), plain) and torch.equal(run(), plain)
        executor.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
other.join()
assert torch.equal(run(), plain)
"""
    )
    run_python(code, cwd=_ROOT, path=(_ROOT,))


@beside_torch
def test_the_process_ends_without_close(beside_torch: bool, run_python: RunPython) -> None:
    """Bug: a worker in compiled code keeps the process from ending, or crashes it at the end."""
    code = _setup(beside_torch) + "threading.Thread(target=run).start()\nprint('done')\n"
    assert run_python(code, cwd=_ROOT, path=(_ROOT,)).stdout.strip() == "done"


@beside_torch
def test_four_callers_released_at_once(beside_torch: bool, run_python: RunPython) -> None:
    """Bug: the first calls of a process race in compiling, or in starting the workers, and abort the process."""
    code = (
        _setup(beside_torch).replace("plain = run()\n", "")
        + """
barrier, results = threading.Barrier(4), []
def call():
    barrier.wait()
    results.extend(run() for _ in range(100))
callers = [threading.Thread(target=call) for _ in range(4)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert len(results) == 400 and all(torch.equal(result, results[0]) for result in results)
"""
    )
    run_python(code, cwd=_ROOT, path=(_ROOT,))
