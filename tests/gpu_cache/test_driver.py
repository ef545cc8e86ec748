"""The driver's calls: how torch's device module is asked, shown by a module that notes what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.driver import Driver
from tests.gpu_cache.fake_driver import FakeDriver
from tests.gpu_cache.test_overlap import make_layers, run_steps

SECOND = torch.device("cpu", 1)  # stands for the second GPU


class Runtime:
    """`torch.cuda`, as far as pages go. A device that is current has a context; registered pages are its own alone,
    unless they are portable."""

    def __init__(self, code: int = 0) -> None:
        self.current, self.code = torch.device("cpu", 0), code
        self.pinned: list[tuple[int, int, bool]] = []  # address, bytes, for all devices
        self.contexts: set[torch.device] = set()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        former, self.current = self.current, device
        yield
        self.current = former

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=self._register,
            cudaHostUnregister=self._unregister,
            cudaGetErrorString={1: "invalid argument", 713: "host memory is not registered"}.get,
        )

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        self.contexts.add(self.current)
        if not self.code:
            self.pinned.append((address, nbytes, bool(flags & 1)))
        return self.code

    def _unregister(self, address: int) -> int:
        self.contexts.add(self.current)
        kept = [entry for entry in self.pinned if entry[0] != address]
        code, self.pinned = 0 if len(kept) < len(self.pinned) else 713, kept
        return code


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(code: int = 0) -> tuple[Driver, Runtime]:
        runtime = Runtime(code)
        monkeypatch.setattr(torch, "get_device_module", lambda device: runtime)
        return Driver(SECOND), runtime

    return make


def test_pages_are_pinned_for_the_device_that_copies_from_them(opened: Any) -> None:
    """Catches pages that are pinned for the first device only, so that copies to the second block the host, and a
    context on the first that nobody has asked for."""
    driver, runtime = opened()
    host = torch.zeros(64, dtype=torch.uint8)
    assert driver.register(host) is None
    assert runtime.pinned == [(host.data_ptr(), 64, True)]
    assert driver.unregister(host) is None
    assert runtime.pinned == []
    assert runtime.contexts == {SECOND}
    assert runtime.current == torch.device("cpu", 0)


def test_refusals_say_why(opened: Any) -> None:
    """Catches a number that means nothing to whoever reads the warning, and pages that stay pinned in silence."""
    driver, _ = opened(1)
    host = torch.zeros(2048, dtype=torch.uint8)
    assert driver.register(host) == "cudaHostRegister of 2,048 bytes returned 1: invalid argument"
    assert "host memory is not registered" in str(driver.unregister(host))


def test_pages_that_cannot_be_unpinned_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a code that is dropped, and a cache that stops half-way through giving pages back."""
    layers = make_layers(2)
    driver = FakeDriver(fails=lambda name, number: name == "unregister" and number == 1)
    ExpertCache(AcceleratorDevice(driver), layers, 1 << 24).close()
    assert "stays pinned (injected: refused)" in caplog.text
    assert driver.calls["unregister"] == 2


def test_no_memory_of_former_pools_is_kept() -> None:
    """Catches a pool's block that torch's allocator keeps: other processes lack it, and what takes a piece of it
    leaves no room for the next pool."""
    layers, driver = make_layers(), FakeDriver()
    cache = ExpertCache(AcceleratorDevice(driver), layers, layers[0].records.nbytes)
    run_steps(cache, layers, 8)
    cache.resize(2 * layers[0].records.nbytes)
    assert driver.kept == 0
    cache.close()
    assert driver.kept == 0
    assert not driver.alive
