"""Copies to an accelerator: straight from pinned memory, or through a ring of buffers where pinning is refused."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.staging import BUFFERS
from tests.gpu_cache.fake_driver import POISON, FakeDriver
from tests.gpu_cache.test_overlap import make_layers, run_steps


def records(count: int, nbytes: int = 64) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.uint8)[:, None].repeat(1, nbytes)


def open_device(**options: Any) -> tuple[AcceleratorDevice, FakeDriver]:
    driver = FakeDriver(**options)
    return AcceleratorDevice(driver), driver


def test_pinned_memory_needs_no_buffers() -> None:
    """Catches a detour through buffers, a thread, or pages that stay registered."""
    device, driver = open_device()
    host, threads = records(3), threading.active_count()
    assert device.pin(host)
    pool = device.allocate(3, 64)
    for i in range(3):
        device.copy(pool[i], host[i], None, urgent=bool(i % 2))
    assert (pool == POISON).any(), "they are late"
    device.finish_copies()
    assert torch.equal(pool, host)
    assert device.refusal is None
    assert "pinned" not in driver.calls
    assert threading.active_count() == threads
    device.close()
    device.unpin(host)
    assert driver.registered == set()


def test_copies_for_one_launch_are_one_wait() -> None:
    """Catches events for each expert of a chunk, which take the host longer than the copies' calls themselves."""
    device, driver = open_device()
    host, pool = records(3), device.allocate(3, 64)
    device.pin(host)
    copies = device.copy_all(list(pool), list(host), [None] * 3, urgent=True)
    assert len(set(copies)) == 1
    assert driver.calls["event"] == 2
    assert not copies[0].done()
    copies[0].wait()
    assert torch.equal(pool, host)
    assert copies[0].elapsed_us() == pytest.approx(10 / 3), "of one expert, by which uploads are priced"


def test_an_upload_of_several_that_fails_half_way() -> None:
    """Catches a copy that has begun when a later one of the same call fails, and overwrites who has the slot next."""
    layers, failing = make_layers(1), [False]
    driver = FakeDriver(fails=lambda name, number: failing[0] and name == "copy" and driver.calls["copy"] % 3 == 0)
    cache = ExpertCache(AcceleratorDevice(driver), layers, layers[0].records.nbytes)
    layer = cache.layer(0)
    for _ in range(3):
        layer.lookup(np.arange(3, dtype=np.int32))
        failing[0] = True
        with pytest.raises(RuntimeError, match="copy failed"):
            layer.fetch(np.arange(3, dtype=np.int32))
        failing[0] = False
        layer.finish()
        assert (layer.slots() < 0).all()
        slots = layer.fetch(np.array([3], np.int32))
        layer.wait(slots)
        layer.finish()
        driver.synchronize()
        assert torch.equal(layer.memory[int(slots[0])], layers[0].records[3])
        cache._pools[0].reset()
    cache.close()


@pytest.mark.parametrize("refuses", [False, True], ids=["pinned", "staged"])
def test_spans_are_on_the_host_clock(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the sign, the unit, or the wrong end of what events say of their distance to the present."""
    device, _ = open_device(refuses=refuses)
    host = records(1)
    device.pin(host)
    copy = device.copy(device.allocate(1, 64)[0], host[0], None, urgent=False)
    device.finish_copies()
    monkeypatch.setattr("moebius.gpu_cache.accelerator.perf_counter", lambda: 50.0)
    distances = iter([30.0, 10.0])  # milliseconds from the beginning and from the end to now
    monkeypatch.setattr("tests.gpu_cache.fake_driver.FakeEvent.elapsed_time", lambda *_: next(distances))
    assert copy.span() == pytest.approx((50.0 - 0.030, 50.0 - 0.010))
    device.close()


def test_refused_pages_go_through_a_ring() -> None:
    """Catches a buffer that is filled again before its former record has been sent."""
    device, driver = open_device(refuses=True)
    host, threads = records(100), threading.active_count()
    assert not device.pin(host)
    assert device.refusal == "injected: refused"
    pool = device.allocate(100, 64)
    transfers = [device.copy(pool[i], host[i], None, urgent=i % 7 == 0) for i in range(100)]
    device.finish_copies()
    assert all(transfer.done() for transfer in transfers)
    assert all(transfer.error is None and transfer.elapsed_us() > 0 for transfer in transfers)
    assert torch.equal(pool, host)
    assert driver.calls["pinned"] == BUFFERS
    device.close()
    assert threading.active_count() == threads


def test_records_of_several_sizes_share_the_ring() -> None:
    device, driver = open_device(refuses=True)
    small, large = records(3, 64), records(3, 256)
    for host in (small, large, small):
        device.pin(host)
    assert driver.calls["pinned"] == 2 * BUFFERS
    pools = [device.allocate(3, host.shape[1]) for host in (small, large)]
    for i in range(3):
        for pool, host in zip(pools, (small, large), strict=True):
            device.copy(pool[i], host[i], None, urgent=False)
    device.finish_copies()
    assert torch.equal(pools[0], small)
    assert torch.equal(pools[1], large)
    device.close()


def test_a_computation_waits_for_a_staged_copy() -> None:
    """Catches a stream that does not wait, since the event it has to await did not exist yet."""
    device, _ = open_device(refuses=True)
    host, pool = records(1), device.allocate(1, 64)
    device.pin(host)
    copy = device.copy(pool[0], host[0], None, urgent=True)
    assert torch.equal(device.compute(pool.clone, [copy]).result(), host)
    device.close()


def test_a_staged_copy_that_fails() -> None:
    """Catches a computation on half an expert, and a caller who waits for ever."""
    device, _ = open_device(refuses=True, fails=lambda name, number: name == "copy")
    host, pool = records(2), device.allocate(2, 64)
    device.pin(host)
    copy = device.copy(pool[0], host[0], None, urgent=False)
    copy.wait()
    assert copy.done()
    with pytest.raises(RuntimeError, match="upload failed") as raised:
        device.compute(pool.clone, [copy])
    assert "copy failed" in str(raised.value.__cause__)
    device.close()


def test_copies_that_wait_when_the_device_closes() -> None:
    """Catches a waiter for a copy that nobody will make any more."""
    device, driver = open_device(refuses=True)
    host, pool = records(2), device.allocate(2, 64)
    device.pin(host)
    begun, gate, send = threading.Event(), threading.Event(), driver.copy

    def blocked(target: torch.Tensor, source: torch.Tensor) -> None:
        begun.set()
        gate.wait()
        send(target, source)

    driver.copy = blocked  # type: ignore[method-assign]
    first, second = (device.copy(pool[i], host[i], None, urgent=False) for i in range(2))
    begun.wait()
    closing = threading.Thread(target=device.close)
    closing.start()
    while not device._staging._worker._queue.stopping.is_set():
        pass
    gate.set()
    closing.join()
    assert first.error is None
    assert "closed before" in str(second.error)


def test_no_pinned_memory_at_all_is_an_error() -> None:
    """Catches copies that block every layer, which nobody would notice but by the clock."""
    driver = FakeDriver(refuses=True, fails=lambda name, number: name == "pinned" and number > 3)
    with pytest.raises(RuntimeError, match=r"pins neither the experts' host memory nor 4 buffers .*ulimit -l"):
        ExpertCache(AcceleratorDevice(driver), make_layers(), 1 << 24)


class _Limited(FakeDriver):
    """Pins the pages of two stores, and then nothing: the ring would not fit beside them."""

    def register(self, host: torch.Tensor) -> str | None:
        return "injected: the limit" if len(self.registered) == 2 else super().register(host)

    def pinned(self, nbytes: int) -> torch.Tensor:
        if len(self.registered) == 2:
            raise RuntimeError("injected: the limit")
        return super().pinned(nbytes)


def test_pages_that_take_all_that_may_be_pinned() -> None:
    """Catches a model that cannot be patched since its first layers left no room for the ring of the others."""
    layers, driver = make_layers(), _Limited()
    cache = ExpertCache(AcceleratorDevice(driver), layers, layers[0].records.nbytes)
    assert driver.calls["unregister"] == 1, "one store's pages made room for the ring"
    run_steps(cache, layers, 40)
    cache.close()
    assert driver.registered == set()
    assert driver.calls["unregister"] == driver.calls["register"] == 3


@pytest.mark.parametrize("refuses", [False, True], ids=["pinned", "staged"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_results_while_copies_are_late(share: float, refuses: bool) -> None:
    """Catches a slot that is read before its copy, on streams that do nothing until somebody waits for them."""
    layers, threads = make_layers(), threading.active_count()
    for seed in range(3):
        driver = FakeDriver(seed, refuses)
        budget = int(share * sum(layer.records.nbytes for layer in layers))
        cache = ExpertCache(AcceleratorDevice(driver), layers, budget)
        run_steps(cache, layers, 40)
        allocated = {name: driver.calls.get(name) for name in ("empty", "pinned", "register")}
        run_steps(cache, layers, 40)
        assert {name: driver.calls.get(name) for name in allocated} == allocated, "memory was asked for while running"
        cache.drain()
        assert 0 < cache.resident.sum() <= cache.slots
        cache.close()
        assert driver.registered == set()
    assert threading.active_count() == threads


def test_a_forgotten_cache_ends_its_staging_thread() -> None:
    layers, threads = make_layers(1), threading.active_count()
    cache = ExpertCache(AcceleratorDevice(FakeDriver(refuses=True)), layers, layers[0].records.nbytes)
    run_steps(cache, layers, 4)
    assert threading.active_count() == threads + 1
    del cache
    gc.collect()
    assert threading.active_count() == threads


def test_an_accelerator_without_page_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches CUDA's runtime called on XPU."""
    module = SimpleNamespace(Stream=object, Event=object)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert Driver(torch.device("xpu", 0)).register(records(1)) == "torch registers no host memory for xpu"
