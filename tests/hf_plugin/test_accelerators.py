"""Whole models on `AcceleratorDevice` over a fake driver: late copies, refused pages, copies and memory that fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import moebius
from moebius.gpu_cache import executor
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.staging import BUFFERS
from moebius.hf_plugin import patching
from moebius.hf_plugin.running import tiers
from moebius.hf_plugin.running.held import HeldWeights
from moebius.kernels.routes import Routes
from moebius.predictors.costs import Assignment, CostModel
from tests import zoo
from tests.gpu_cache.fake_driver import FakeDriver
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt

Open = Callable[..., FakeDriver]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Replaces the device that "emulated" opens, by one over the driver that it returns."""
    drivers: list[FakeDriver] = []
    threads = 0

    def choose(**options: Any) -> FakeDriver:
        nonlocal threads
        threads = set(threading.enumerate())
        drivers.append(FakeDriver(**options))
        monkeypatch.setattr(tiers, "open_device", lambda name, link: AcceleratorDevice(drivers[-1]))
        return drivers[-1]

    yield choose
    assert set(threading.enumerate()) <= threads
    assert all(driver.registered == set() for driver in drivers), "pages that stay pinned"


@pytest.mark.parametrize("refuses", [False, True], ids=["pinned", "staged"])
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_models_with_late_copies(opened: Open, budget: float, refuses: bool) -> None:
    """Catches a result that depends on when a copy ends, and staging that nobody is told of."""
    model = helpers.trained()
    ids = prompt(model)
    want, tokens = logits(model, ids), greedy(model, ids)
    driver = opened(refuses=refuses)
    with patched(model, device="emulated", gpu_memory=budget):
        for _ in range(3):
            assert_close(logits(model, ids), want)
            assert greedy(model, ids) == tokens
        stats = moebius.stats(model)
        assert stats.sums.hits > 0
        assert driver.calls["copy"] > 0
        assert any("not pinned (injected: refused)" in note for note in stats.notes) is refuses


@pytest.mark.parametrize("refuses", [False, True], ids=["pinned", "staged"])
def test_copies_that_fail(opened: Open, refuses: bool) -> None:
    """Catches half an expert in a slot that counts as its own, and a model that is of no use afterwards."""
    model = helpers.trained()
    ids, failing = prompt(model), [False]
    want = greedy(model, ids)
    opened(refuses=refuses, fails=lambda name, number: failing[0] and name == "copy" and number % 5 == 0)
    with patched(model, device="emulated", gpu_memory=0.5):
        failing[0], errors = True, 0
        for _ in range(6):
            try:
                assert greedy(model, ids) == want
            except RuntimeError as error:
                errors += "copy failed" in f"{error} {error.__cause__}"
        assert errors > 0
        failing[0] = False
        for _ in range(3):
            try:
                assert greedy(model, ids) == want
                break
            except RuntimeError as error:  # of copies that failed before, each reported once
                assert "copying expert" in str(error)  # noqa: PT017
        assert greedy(model, ids) == want
        assert moebius.stats(model).sums.hits > 0


@pytest.mark.parametrize("call", [1, 2, 3, BUFFERS + 1, BUFFERS + 2])
def test_pages_that_are_refused_half_way(opened: Open, call: int) -> None:
    """Catches pages of the first layers that stay pinned, or all of them staged since one was refused."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    driver = opened(fails=lambda name, number: name == "register" and number == call)
    with patched(model, device="emulated", gpu_memory=0.5):
        assert len(driver.registered) == 5
        assert greedy(model, ids) == want


@pytest.mark.parametrize("call", [1, 2, 3, BUFFERS + 1, BUFFERS + 2])
def test_memory_that_fails_while_a_model_is_patched(opened: Open, call: int) -> None:
    """Catches slots, pins or a module that a patch which had to give up leaves behind."""
    model = zoo.build("qwen3_moe")
    with helpers.unchanged(model):
        driver = opened(refuses=True, fails=lambda name, number: name == "pinned" and number == call)
        with pytest.raises(RuntimeError, match=r"the driver pins n.*ulimit"):
            moebius.patch(model, device="emulated", gpu_memory=0.5)
        assert driver.registered == set()


def test_a_kernel_that_fails(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pins of a launch that never was, and an event that nobody has recorded."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    opened(refuses=True)

    def broken(*_: Any) -> None:
        raise RuntimeError("injected: illegal instruction")

    with patched(model, device="emulated", gpu_memory=0.5):
        assert greedy(model, ids) == want
        with monkeypatch.context() as kernels:
            kernels.setattr(executor, "moe_forward", broken)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="illegal instruction"):
                    greedy(model, ids)
        assert greedy(model, ids) == want
        moebius.resize(model, gpu_memory=0.25)
        assert greedy(model, ids) == want


def test_unpatch_after_an_error_that_stays(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches modules, threads or locks that stay behind the first of many calls which a lost device refuses."""
    model = helpers.trained()
    ids, before = prompt(model), helpers.weights(model)
    want, threads = greedy(model, ids), set(threading.enumerate())
    driver = opened(refuses=False, fails=lambda name, number: name == "unregister")

    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    moebius.patch(model, device="emulated", gpu_memory=0.5)
    assert greedy(model, ids) == want
    driver.synchronize()  # a device that is lost copies nothing any more
    with monkeypatch.context() as dead:
        for name in ("synchronize", "copy", "fetch", "trim", "free_memory", "event"):
            dead.setattr(driver, name, lost)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            greedy(model, ids)
        with pytest.raises(RuntimeError, match="illegal memory access") as raised:
            moebius.unpatch(model)
    assert "the model is unpatched and has its experts" in raised.value.__notes__[0]
    assert not moebius.is_patched(model)
    helpers.assert_same_weights(model, before)
    assert greedy(model, ids) == want
    assert not driver.registered
    assert set(threading.enumerate()) <= threads
    with patched(model, device="cpu"):
        assert greedy(model, ids) == want


def test_experts_whose_own_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a module without weights where those were on the device that no longer takes them back."""
    model = helpers.trained()
    before, calls, real = helpers.weights(model), iter(range(10**6)), HeldWeights._unpack
    moebius.patch(model, device="cpu")

    def unpack(self: HeldWeights, *arguments: Any) -> dict[str, torch.Tensor]:
        if next(calls) % 2 == 0:  # where they were, which fails; then in host memory
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, *arguments)

    monkeypatch.setattr(HeldWeights, "_unpack", unpack)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        moebius.unpatch(model)
    assert not moebius.is_patched(model)
    helpers.assert_same_weights(model, before)


def test_nothing_is_allocated_while_generating(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches device memory, pinned memory, pages or events that are asked for on the decode path, and a layer that
    crosses to the host or back more than once."""

    def residents_and_one_more(costs: CostModel, routes: Routes, slots: np.ndarray) -> Assignment:
        """Not by measured times, by which a later step may have more launches at once than all before."""
        absent = slots < 0
        return Assignment.where(~absent | (absent & (np.cumsum(absent) == 1)), routes, slots)

    monkeypatch.setattr(CostModel, "assign", residents_and_one_more)
    model = helpers.trained()
    ids = prompt(model)
    driver = opened(refuses=True)
    with patched(model, device="emulated", gpu_memory=0.3):
        for _ in range(3):
            greedy(model, ids, max_new_tokens=24)
        moebius.reset_stats(model)
        before = dict(driver.calls)
        greedy(model, ids, max_new_tokens=24)
        more = {name: count - before[name] for name, count in driver.calls.items() if count > before[name]}
        steps = 24 * len(helpers.experts_modules(model))
        assert more.pop("fetch") == steps
        assert moebius.stats(model).sums.misses > 0
        assert 0 < more.pop("copy") - moebius.stats(model).sums.uploads <= steps
        assert not more


def test_outputs_are_the_caller_s_own(opened: Open) -> None:
    """Catches a layer whose output is a kept buffer, which the next layer overwrites."""
    model = helpers.trained()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    opened()
    with patched(model, device="emulated", gpu_memory=0.02, prefetch=False), torch.no_grad():
        for module in helpers.experts_modules(model):
            module.register_forward_hook(lambda _module, _inputs, output: kept.append((output, output.clone())))
        for token in prompt(model)[0, :20]:
            model(token[None, None])
    assert len(kept) >= 20
    assert all(torch.equal(*pair) for pair in kept)


@pytest.mark.parametrize("refuses", [False, True], ids=["pinned", "staged"])
def test_cycles_give_pages_and_memory_back(opened: Open, refuses: bool) -> None:
    """Catches slots, buffers or pinned pages of a model that is unpatched, and whose cache has been resized."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want, driver = greedy(model, ids), opened(refuses=refuses)
    for _ in range(10):
        with patched(model, device="emulated", gpu_memory=0.5):
            assert greedy(model, ids) == want
            moebius.resize(model, gpu_memory=0.25)
            assert greedy(model, ids) == want
            assert len(driver.alive) == 5 + BUFFERS * refuses, "one pool, what crosses, and the ring"
            assert len(driver.registered) == (0 if refuses else 2)
        assert not driver.alive
        assert not driver.registered


def test_auto_names_any_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name that torch found and our own options refuse."""
    monkeypatch.setattr(patching, "resolve_device", lambda name: "xpu" if name == "auto" else name)
    assert patching.make_options({}).device == "xpu"
    assert patching.make_options({"device": "xpu:1"}).device == "xpu:1"
    for name in ("meta", "gpu", "cuda:x", "cpu:0", "emulated:1"):
        with pytest.raises(ValueError, match="is unknown; use"):
            patching.make_options({"device": name})
