"""Threads, signals and lifetimes: calls from several threads, errors in ours, interrupts, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import moebius
from moebius.cpu_experts.executor import CpuExecutor
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.gpu_cache.layer_cache import LayerCache
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EMULATED, PLACEMENTS, assert_close, everywhere, greedy, logits, patched, prompt

pytestmark = pytest.mark.usefixtures("prefetching")

THREADED: list[dict[str, Any]] = [options | {"cpu_threads": 2} for options in PLACEMENTS.values()]
threaded = pytest.mark.parametrize("options", THREADED, ids=PLACEMENTS.keys())


# ---- several threads


@threaded
def test_generate_from_several_threads(options: dict[str, Any]) -> None:
    """Catches buffers, pins or predictions that calls of several threads share."""
    model = zoo.build("qwen3_moe")
    prompts = [helpers.prompt(model, 1, length) for length in (5, 12, 9, 17)]
    want = [greedy(model, ids) for ids in prompts]
    barrier = threading.Barrier(len(prompts))

    def run(ids: torch.Tensor) -> list[list[list[int]]]:
        barrier.wait()
        return [greedy(model, ids) for _ in range(3)]

    with patched(model, **options):
        with ThreadPoolExecutor(len(prompts)) as pool:
            got = list(pool.map(run, prompts))
        stats = moebius.stats(model).to_dict()
    assert got == [[tokens] * 3 for tokens in want]
    layer = stats["layers"][0]
    assert layer["hits"] + layer["misses"] == 2 * layer["tokens"]


@threaded
def test_two_models_at_once(options: dict[str, Any]) -> None:
    """Catches state that two patched models share in the process."""
    models = [zoo.build("qwen3_moe", seed=seed) for seed in (0, 1)]
    ids = prompt(models[0])
    want = [greedy(model, ids) for model in models]
    barrier = threading.Barrier(2)

    def run(model: Any) -> list[list[list[int]]]:
        barrier.wait()
        return [greedy(model, ids) for _ in range(3)]

    with patched(models[0], **options), patched(models[1], **options), ThreadPoolExecutor(2) as pool:
        got = list(pool.map(run, models))
    assert got == [[tokens] * 3 for tokens in want]


@everywhere
def test_statistics_and_resize_while_generating(options: dict[str, Any]) -> None:
    """Catches a cache that is replaced or read in the middle of a layer."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    want = greedy(model, ids)
    with patched(model, **options), ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [greedy(model, ids) for _ in range(6)])
        for budget in (0.25, 1.0, 0.5) * 3:
            if options["device"] != "cpu":
                moebius.resize(model, gpu_memory=budget)
            str(moebius.stats(model))
            moebius.reset_stats(model)
        assert running.result() == [want] * 6


def test_the_budget_changes_under_load() -> None:
    """Catches slots that are given back while some thread's layer computes from them, and a step without any."""
    model = helpers.trained()
    prompts = [helpers.prompt(model, 1, length) for length in (5, 12, 9)]
    want = [greedy(model, ids) for ids in prompts]
    done = threading.Event()

    def run(ids: torch.Tensor) -> list[list[list[int]]]:
        return [greedy(model, ids) for _ in range(3)]

    def resize() -> int:
        for count, budget in enumerate(itertools.cycle((0.1, 1.0, 0.5, "1%"))):
            if done.is_set():
                return count
            moebius.resize(model, gpu_memory=budget)
        raise AssertionError

    with patched(model, **EMULATED), ThreadPoolExecutor(4) as pool:
        resizing, running = pool.submit(resize), [pool.submit(run, ids) for ids in prompts]
        try:
            assert [future.result() for future in running] == [[tokens] * 3 for tokens in want]
        finally:
            done.set()
        assert resizing.result() > 3


# ---- errors


def _many_forwards(model: PreTrainedModel, ids: torch.Tensor) -> None:
    for _ in range(20):
        greedy(model, ids)


def _runtime(model: PreTrainedModel) -> Any:
    [layer, *_] = helpers.experts_modules(model)
    return vars(layer)["_moebius"].runtime


class BrokenError(Exception):
    pass


def _broken(*_: Any, **__: Any) -> Any:
    raise BrokenError("broken on purpose")


@everywhere
def test_an_error_of_the_cpu_experts_reaches_the_caller(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a swallowed error, and pins or locks that it leaves behind."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, **options):
        with monkeypatch.context() as broken:
            broken.setattr(CpuExecutor, "run", _broken)
            for _ in range(3):
                with pytest.raises(BrokenError, match="on purpose"):
                    greedy(model, ids)
        for _ in range(2):
            assert greedy(model, ids) == want


def test_an_error_of_the_compute_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a caller that waits for ever, or adds the output of a launch that failed."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, **EMULATED):
        assert greedy(model, ids) == want  # so that there are hits
        with monkeypatch.context() as broken:
            broken.setattr("moebius.gpu_cache.executor.moe_forward", _broken)
            for _ in range(3):
                with pytest.raises(BrokenError, match="on purpose"):
                    greedy(model, ids)
        for _ in range(2):
            assert greedy(model, ids) == want


def test_an_error_of_the_copy_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed upload that becomes visible, is forgotten, or takes its slot with it."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, **EMULATED):
        with monkeypatch.context() as broken:
            broken.setattr(EmulatedDevice, "_wait_for_link", _broken)
            with pytest.raises(RuntimeError, match=r"upload.* failed") as error:
                _many_forwards(model, ids)
            assert isinstance(error.value.__cause__, BrokenError)
            _runtime(model).tiers[0].cache._pools[0].settle()
        with suppress(RuntimeError):  # copies that failed after the first are reported once
            logits(model, ids)
        for _ in range(3):
            assert greedy(model, ids) == want
        assert moebius.stats(model).to_dict()["hits"] > 0


# ---- interrupts


@contextmanager
def _interrupted_in(target: Any, name: str, call: int, before: bool) -> Iterator[None]:
    """Raises KeyboardInterrupt at the beginning or the end of the n-th call of a method."""
    original, calls = getattr(target, name), 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == call:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if calls == call:
            raise KeyboardInterrupt
        return result

    setattr(target, name, method)
    try:
        yield
    finally:
        setattr(target, name, original)


INTERRUPTED = [
    *((CpuExecutor, "run", call) for call in (1, 2, 5)),
    *((LayerCache, name, 4) for name in ("lookup", "launch", "used", "admit", "prefetch", "finish", "slots")),
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("target", "name", "call"), INTERRUPTED, ids=[f"{n}-{c}" for _, n, c in INTERRUPTED])
def test_interrupted_anywhere_the_model_stays_usable(target: Any, name: str, call: int, before: bool) -> None:
    """Catches pins, locks and half-done steps that Ctrl-C leaves behind, wherever in a layer it falls."""
    model = zoo.build("qwen3_moe")
    ids, state = prompt(model, 1), helpers.weights(model)
    want = greedy(model, ids)
    with patched(model, **EMULATED):
        with _interrupted_in(target, name, call, before), pytest.raises(KeyboardInterrupt):
            _many_forwards(model, ids)
        if target is CpuExecutor:  # within the step, whose slots are then given back at once
            moebius.resize(model, gpu_memory=0.25)
        for _ in range(3):
            assert greedy(model, ids) == want
        moebius.resize(model, gpu_memory=0.5)  # refused while a step is thought to be under way
        assert greedy(model, ids) == want
    helpers.assert_same_weights(model, state)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where a shell has started the tests in the background, for which it ignores the signal."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@threaded
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_generate(options: dict[str, Any]) -> None:
    """Catches a signal that is lost in compiled code or a worker thread, or that leaves the model unusable."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = greedy(model, ids)
    started = threading.Event()

    class Announce:
        def put(self, value: Any) -> None:
            started.set()

        def end(self) -> None: ...

    def interrupt() -> None:
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    with patched(model, **options):
        for _ in range(3):
            started.clear()
            killer = threading.Thread(target=interrupt)
            killer.start()
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids[:1], **(helpers.EIGHT | {"max_new_tokens": 100_000}), streamer=Announce())
            killer.join()
            assert greedy(model, ids) == want
    helpers.assert_same_weights(model, before)


# ---- lifetimes


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@threaded
@pytest.mark.parametrize("use", [False, True], ids=["idle", "used"])
def test_a_dropped_model_gives_all_back(use: bool, options: dict[str, Any]) -> None:
    """Catches a reference cycle, registry or thread that keeps the experts of a model nobody has any more."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    threads = set(threading.enumerate())
    moebius.patch(model, **options)
    if use:
        greedy(model, ids)
        assert set(threading.enumerate()) - threads
    layers = [module.__dict__["_moebius"] for module in helpers.experts_modules(model)]
    watched = [weakref.ref(thing) for thing in (model, layers[0].runtime, *layers, *(x.store for x in layers))]
    with _without_cycle_collection():
        del layers, model
        assert [reference() for reference in watched] == [None] * len(watched)
    assert set(threading.enumerate()) <= threads


@threaded
def test_a_dropped_copy_gives_all_back(options: dict[str, Any]) -> None:
    """Catches what copy.deepcopy leaves behind: its memo must not tie the copy to the original."""
    import copy

    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    threads = set(threading.enumerate())
    moebius.patch(model, **options)
    twin = copy.deepcopy(model)
    greedy(model, ids)
    greedy(twin, ids)
    watched = [weakref.ref(m) for m in (model, twin)]
    watched += [weakref.ref(helpers.experts_modules(m)[0].__dict__["_moebius"].runtime) for m in (model, twin)]
    with _without_cycle_collection():
        del model, twin
        assert [reference() for reference in watched] == [None] * len(watched)
    assert set(threading.enumerate()) <= threads


@threaded
def test_unpatch_gives_threads_and_memory_back(options: dict[str, Any]) -> None:
    """Catches stores, caches or threads that outlive unpatch, even while the statistics are kept."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    threads = set(threading.enumerate())
    moebius.patch(model, **options)
    greedy(model, ids)
    layers = [module.__dict__["_moebius"] for module in helpers.experts_modules(model)]
    watched = [weakref.ref(thing) for thing in (layers[0].runtime, *layers, *(x.store for x in layers))]
    stats = moebius.stats(model)
    with _without_cycle_collection():
        del layers
        moebius.unpatch(model)
        assert [reference() for reference in watched] == [None] * len(watched)
    assert set(threading.enumerate()) <= threads
    assert stats.to_dict()["tokens"] > 0


@pytest.mark.parametrize("cycles", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_cycles_leak_nothing(cycles: int) -> None:
    """Catches threads, records or slots that each cycle of patch and unpatch leaves behind."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = greedy(model, ids)
    process, threads, resident = psutil.Process(), set(threading.enumerate()), []
    experts_bytes = sum(p.nbytes for m in helpers.experts_modules(model) for p in m.parameters())
    for cycle in range(cycles):
        with patched(model, **THREADED[cycle % 2]):
            assert greedy(model, ids) == want
        assert set(threading.enumerate()) <= threads
        resident.append(process.memory_info().rss)
    leaked = (cycles - 10) * experts_bytes // 2  # half of what would remain if each cycle leaked its experts
    assert resident[-1] - resident[9] < leaked
    helpers.assert_same_weights(model, before)


@pytest.mark.slow
def test_a_process_ends_quietly_with_a_patched_model_alive(tmp_path: Path) -> None:
    """Catches threads that block the exit, and errors out of destructors while the interpreter shuts down."""
    code = (
        "import moebius\n"
        "from tests import zoo\n"
        "models = [zoo.build('qwen3_moe') for _ in range(2)]\n"
        "for model, device in zip(models, ('cpu', 'emulated')):\n"
        "    moebius.patch(model, device=device, gpu_memory=0.5, cpu_threads=2)\n"
        "    model.generate(zoo.inputs(model)['input_ids'], max_new_tokens=4, pad_token_id=0)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Error" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_forked_process_can_go_on() -> None:
    """Catches threads that a child of fork believes to have."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    with patched(model, device="cpu", cpu_threads=2):
        logits(model, ids)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert_close(logits(model, ids), want)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert_close(logits(model, ids), want)
