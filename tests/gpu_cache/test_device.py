"""Opening devices, the emulated one's order of events, and the calls that the accelerator's makes."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebius.gpu_cache import accelerator as accelerator_module
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.device import default_device, open_device
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.gpu_cache.worker import Job, Worker
from moebius.hf_plugin.running.defaults import resolve_device

no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")


@no_accelerator
def test_cuda_without_cuda_says_what_to_use():
    with pytest.raises(RuntimeError, match=r"'cuda:1' was asked for, but torch .* found .*; use device='cpu', or"):
        open_device("cuda:1")


@pytest.mark.parametrize("name", ["cpu", "meta", "gpu", "cuda:x", ""])
def test_names_that_are_no_device_with_a_cache(name):
    with pytest.raises(ValueError, match="use device='cpu'"):
        open_device(name)


def test_an_accelerator_without_streams_is_refused(monkeypatch):
    """mps, which "auto" would find."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    with pytest.raises(RuntimeError, match="'mps' has no streams"):
        open_device("mps")
    with pytest.raises(RuntimeError, match="there are 1 mps devices"):
        open_device("mps:1")


def test_the_default_is_an_accelerator_with_streams_or_the_cpu(monkeypatch):
    """ "auto" on a Mac must not end in a refusal."""
    for found, module, expected in (
        (None, None, "cpu"),
        (torch.device("mps"), SimpleNamespace(), "cpu"),
        (torch.device("xpu"), SimpleNamespace(Stream=object), "xpu"),
    ):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        assert default_device() == expected
        assert resolve_device("auto") == expected
        assert resolve_device("mps") == "mps", "asked for by name it is refused, not replaced"


def test_a_link_speed_is_for_the_emulated_device():
    with pytest.raises(ValueError, match="emulated_link=5 has no meaning on 'cuda'"):
        open_device("cuda", 5)
    for speed in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            open_device("emulated", speed)


def records(count: int, nbytes: int = 64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None].repeat(1, nbytes)


@pytest.fixture
def emulated():
    device = EmulatedDevice()
    yield device
    device.close()


def test_a_copy_waits_for_the_last_reader_of_its_slot(emulated):
    """Overwriting a slot under the computation that reads it."""
    gate, pool, host = threading.Event(), emulated.allocate(1, 64), records(2)
    pool.copy_(host[:1])

    def work() -> torch.Tensor:
        gate.wait()
        return pool.clone()

    launch = emulated.compute(work, [])
    copy = emulated.copy(pool[0], host[1], launch.completion, urgent=True)
    assert not copy.done()
    gate.set()
    assert torch.equal(launch.result(), host[:1])
    copy.wait()
    assert torch.equal(pool, host[1:])


def test_a_computation_waits_for_the_copies_it_reads(emulated):
    gate, pool, host = threading.Event(), emulated.allocate(1, 64), records(1)
    blocker = emulated.compute(lambda: torch.tensor(gate.wait()), [])
    copy = emulated.copy(pool[0], host[0], blocker.completion, urgent=False)
    other = EmulatedDevice()  # a compute thread that is not behind the blocker
    launch = other.compute(pool.clone, [copy])
    assert not launch.completion.done()
    gate.set()
    assert torch.equal(launch.result(), host)
    other.close()


def test_an_urgent_copy_overtakes_only_where_it_need_not_wait(emulated):
    """A demand copy behind a queue of prefetches; or a deadlock of one that waits in front of what it waits for."""
    begun, gate, pool, host = threading.Event(), threading.Event(), emulated.allocate(2, 64), records(2)

    def block() -> torch.Tensor:
        begun.set()
        return torch.tensor(gate.wait())

    slow = Job(block, [])
    emulated._copies.submit(slow)
    begun.wait()
    reader = emulated.compute(lambda: torch.tensor(1), [slow.completion])
    behind = emulated.copy(pool[0], host[0], reader.completion, urgent=True)
    overtaking = emulated.copy(pool[1], host[1], None, urgent=True)
    assert [job.completion for job in emulated._copies._queue.jobs] == [overtaking, behind]
    gate.set()
    behind.wait()
    assert torch.equal(pool, host)


def test_a_failed_copy_fails_the_computation_that_needs_it(emulated):
    copy = emulated.copy(torch.zeros(3, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), None, urgent=False)
    copy.wait()
    assert isinstance(copy.error, ValueError)
    with pytest.raises(RuntimeError, match="upload failed") as raised:
        emulated.compute(lambda: torch.zeros(1), [copy]).result()
    assert raised.value.__cause__ is copy.error


def test_close_ends_copies_on_a_slow_link_at_once():
    """A thread that sleeps through unpatch."""
    device = EmulatedDevice(link=1e-9)  # 64 bytes in a minute
    pool, host = device.allocate(2, 64), records(2)
    copies = [device.copy(pool[i], host[i], None, urgent=False) for i in range(2)]
    launch = device.compute(lambda: torch.zeros(1), copies)
    device.close()
    assert all("closed" in str(copy.error) for copy in copies)
    with pytest.raises(RuntimeError):
        launch.result()
    device.close()


def test_the_emulated_device_works_again_after_close(emulated):
    emulated.close()
    assert emulated.compute(lambda: torch.ones(1), []).result().item() == 1


def test_the_link_takes_its_time(monkeypatch):
    """Copies that share a link take turns; a late wake-up is made good by the next copy."""
    now, pauses = [0.0], []
    monkeypatch.setattr("moebius.gpu_cache.emulated.monotonic", lambda: now[0])
    device = EmulatedDevice(link=1.0)

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        now[0] += seconds + 0.25
        return False

    monkeypatch.setattr(device._copies, "pause", pause)
    for _ in range(3):
        device._wait_for_link(issued=0.0, nbytes=10**9)
    assert pauses == [1.0, 0.75, 0.75]


def test_copies_are_timed_where_they_run(monkeypatch):
    """A duration that includes the wait for a reader, or leaves out the link."""
    now = [0.0]
    monkeypatch.setattr("moebius.gpu_cache.emulated.monotonic", lambda: now[0])
    monkeypatch.setattr("moebius.gpu_cache.worker.monotonic", lambda: now[0])
    monkeypatch.setattr("moebius.gpu_cache.worker.perf_counter", lambda: now[0])
    device, gate = EmulatedDevice(link=1.0), threading.Event()

    def pause(seconds: float) -> bool:
        now[0] += seconds
        return False

    monkeypatch.setattr(device._copies, "pause", pause)
    pool, host = device.allocate(1, 1000), records(2, 1000)
    reader = device.compute(lambda: torch.tensor(gate.wait()), [])
    copy = device.copy(pool[0], host[1], reader.completion, urgent=False)
    now[0] = 5.0
    gate.set()
    device.finish_copies()
    assert copy.done()
    assert copy.elapsed_us() == pytest.approx(1.0)
    device.close()
    device.finish_copies()


def test_an_idle_worker_keeps_no_tensor_alive():
    """The last job's tensors on a device whose memory is being given back."""
    worker, held = Worker("test"), SimpleNamespace(tensor=torch.ones(1))
    count = sys.getrefcount(held)
    for _ in range(2):  # the first is certainly over when the second has begun
        job = Job(lambda held=held: held.tensor, [])
        worker.submit(job)
        job.result()
        del job
    worker.close()
    assert sys.getrefcount(held) == count


class Recorder:
    """Stands for ``torch.cuda``: writes down what is asked of streams, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refusal = 0
        recorder = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.name = ""

            def record(self, stream: Any) -> None:
                self.name = f"event{len(recorder.log)}"
                recorder.log.append(f"{stream.name} records {self.name}")

        class Stream:
            def __init__(self, device: object = None, priority: int = 0) -> None:
                self.name = "urgent" if priority else "background"

            def wait_event(self, event: Event) -> None:
                recorder.log.append(f"{self.name} awaits {event.name}")

            def wait_stream(self, stream: Any) -> None:
                recorder.log.append(f"{self.name} awaits {stream.name}")

        self.Event, self.Stream = Event, Stream
        self.current = Stream()
        self.current.name = "main"

    def current_stream(self, device: object) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any):
        former, self.current = self.current, stream
        yield
        self.current = former

    @contextmanager
    def device(self, device: object):
        yield

    def synchronize(self, device: object) -> None:
        self.log.append("synchronize")

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=lambda pointer, nbytes, flags: self.refusal,
            cudaHostUnregister=lambda pointer: self.log.append("unregister") or 0,
            cudaGetErrorString=lambda code: "refused by the test",
        )


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch, "get_device_module", lambda device: recorder)
    return recorder


def accelerator() -> AcceleratorDevice:
    return AcceleratorDevice(Driver(torch.device("cpu")))


def test_an_accelerator_that_is_not_cuda(recorder, monkeypatch):
    """Catches a question that only torch.cuda answers, where torch.accelerator and the device's own module do."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(Driver, "pinned", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.delattr(Recorder, "cudart")
    recorder.mem_get_info = lambda device: (1000, 2000)
    recorder.memory_reserved, recorder.memory_allocated = (lambda device: 300), (lambda device: 100)
    device = open_device("xpu")
    assert device.torch_device == torch.device("xpu", 1)
    assert (device.name, device.free_memory()) == ("xpu:1", 1200)
    assert not device.pin(records(1))
    assert device.refusal == "torch registers no host memory for xpu"
    device.close()


def test_nothing_here_asks_torch_cuda():
    """Catches an answer for CUDA alone in code that all accelerators run."""
    folder = Path(accelerator_module.__file__).parent
    named = {path.name for path in folder.glob("*.py") if "torch.cuda." in path.read_text()}
    assert named == set()


def test_copy_streams_wait_for_the_former_owner_of_the_pools_memory(recorder):
    accelerator().allocate(1, 64)
    assert recorder.log == ["background awaits main", "urgent awaits main"]


def test_streams_wait_for_the_events_of_one_another(recorder):
    """A missing wait is a race that shows on a device only, and seldom."""
    device, pool, host = accelerator(), torch.zeros(2, 64, dtype=torch.uint8), records(2)
    device.pin(host)

    def work() -> torch.Tensor:
        recorder.log.append("work")
        return pool

    upload = device.copy(pool[0], host[0], None, urgent=False)
    launch = device.compute(work, [upload])
    device.copy(pool[0], host[1], launch.completion, urgent=True)
    assert recorder.log == [
        "background records event0",
        "background records event1",
        "main awaits event1",
        "main records event3",
        "work",
        "main records event5",
        "urgent awaits event5",
        "urgent records event7",
        "urgent records event8",
    ]


def test_a_result_taken_on_another_stream_waits_there(recorder):
    device = accelerator()
    launch = device.compute(
        lambda: SimpleNamespace(record_stream=lambda s: recorder.log.append(f"kept for {s.name}")), []
    )
    del recorder.log[:]
    launch.result()
    assert recorder.log == [], "on its own stream the order is given"
    with recorder.stream(
        SimpleNamespace(name="other", wait_event=lambda e: recorder.log.append(f"other awaits {e.name}"))
    ):
        launch.result()
    assert recorder.log == ["other awaits event1", "kept for other"]


def test_refused_pinning_is_said_once_and_not_undone(recorder, caplog, monkeypatch):
    recorder.refusal = 712
    monkeypatch.setattr(Driver, "pinned", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    device = accelerator()
    with caplog.at_level(logging.WARNING):
        assert [device.pin(records(1)), device.pin(records(2))] == [False, False]
    assert len(caplog.records) == 1
    assert "712: refused by the test" in caplog.text


def test_unpinning_waits_for_copies(recorder):
    device, host = accelerator(), records(1)
    assert device.pin(host)
    device.unpin(host)
    assert recorder.log == ["synchronize", "unregister"]
