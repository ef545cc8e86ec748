"""A CUDA device and what everything else stands on, the most basic first: pages, copies, order, times, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from time import perf_counter

import pytest
import torch

from moebius.cpu_experts.store import allocate
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.device import default_device, full_name, open_device
from moebius.gpu_cache.driver import Driver
from tests.gpu_cache.test_overlap import make_layers, open_cache, run_steps

pytestmark = pytest.mark.gpu

LONG = 100_000_000  # cycles, about 50 ms: what is asked right after a launch is asked long before its end
NBYTES = 64 << 20


@pytest.fixture
def device() -> Iterator[AcceleratorDevice]:
    opened = open_device("cuda")
    assert isinstance(opened, AcceleratorDevice)
    yield opened
    opened.close()


def records(count: int, nbytes: int = NBYTES) -> torch.Tensor:
    """Row i is full of i + 1."""
    rows = allocate(count * nbytes).view(count, nbytes)
    for number in range(count):
        rows[number] = number + 1
    return rows


def test_the_device_is_found() -> None:
    assert default_device() == "cuda"
    assert full_name("cuda") == f"cuda:{torch.cuda.current_device()}"


@pytest.mark.parametrize("nbytes", [4096, 5 << 20], ids=["small", "huge pages"])
def test_pages_are_pinned_in_place(nbytes: int) -> None:
    """Catches a call that torch or the driver takes otherwise than we think, and neighbours that share a page."""
    driver = Driver(torch.device("cuda", torch.cuda.current_device()))
    stores = [allocate(nbytes + 64) for _ in range(8)]
    assert [driver.register(host) for host in stores] == [None] * 8
    assert all(driver.is_pinned(host) for host in stores)
    assert "already" in str(driver.register(stores[0]))
    assert [driver.unregister(host) for host in stores] == [None] * 8
    assert not any(driver.is_pinned(host) for host in stores)
    assert driver.unregister(stores[0]) is not None
    assert torch.ones(8, device="cuda").sum().item() == 8, "a refusal is no error of the next kernel"


@pytest.mark.parametrize("urgent", [False, True])
def test_a_copy_runs_beside_the_host(device: AcceleratorDevice, urgent: bool) -> None:
    """Catches a copy for which the host waits, as from pageable memory, and times of something else."""
    host, begun = records(1), perf_counter()
    assert device.pin(host)
    pool = device.allocate(1, NBYTES)
    with device._driver.on(device._urgent if urgent else device._background):
        torch.cuda._sleep(LONG)
    copy = device.copy(pool[0], host[0], None, urgent)
    assert not copy.done()
    copy.wait()
    assert copy.done()
    assert torch.equal(pool.cpu(), host)
    assert 1 < NBYTES / copy.elapsed_us() / 1e3 < 1000, "GB/s"
    span = copy.span()
    assert span is not None
    assert begun < span[0] < span[1] < perf_counter()
    assert (span[1] - span[0]) * 1e6 == pytest.approx(copy.elapsed_us(), rel=0.1)
    device.unpin(host)


def test_refused_pages_are_staged(device: AcceleratorDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a buffer that is filled again while the link reads it."""
    monkeypatch.setattr(Driver, "register", lambda self, host: "refused by the test")
    host = records(12, 4 << 20)
    assert not device.pin(host)
    pool = device.allocate(12, 4 << 20)
    copies = [device.copy(pool[i], host[i], None, urgent=i % 5 == 0) for i in range(12)]
    device.finish_copies()
    assert all(copy.done() and copy.error is None for copy in copies)
    assert torch.equal(pool.cpu(), host)


def test_streams_wait_for_one_another(device: AcceleratorDevice) -> None:
    """Catches a slot that is overwritten while it is read, and one that is read before it is written."""
    host = records(2)
    device.pin(host)
    pool = device.allocate(1, NBYTES)
    first = device.copy(pool[0], host[0], None, urgent=False)

    def slow() -> torch.Tensor:
        torch.cuda._sleep(LONG)
        return pool[0].clone()

    reader = device.compute(slow, [first])
    second = device.copy(pool[0], host[1], reader.completion, urgent=True)
    late = device.compute(pool[0].clone, [second])
    assert not reader.completion.done()
    assert not second.done()
    assert torch.equal(reader.result().cpu(), host[0])
    assert torch.equal(late.result().cpu(), host[1])
    device.unpin(host)


def test_results_are_safe_on_the_caller_s_stream(device: AcceleratorDevice) -> None:
    """Catches a result that another stream reads before it is there."""

    def slow() -> torch.Tensor:
        torch.cuda._sleep(LONG)
        return torch.full((1 << 20,), 7.0, device="cuda")

    launch = device.compute(slow, [])
    with torch.cuda.stream(torch.cuda.Stream()):
        assert launch.result().sum().item() == 7 << 20


def test_closed_pools_go_back_to_the_driver() -> None:
    """Catches memory that torch keeps, or events, tables and results that hold on to it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    layers = make_layers()
    cache = open_cache(layers, 0.5)
    run_steps(cache, layers, 12)
    cache.resize(cache.nbytes // 2)
    run_steps(cache, layers, 12)
    cache.close()
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
