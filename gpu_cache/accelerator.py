"""A GPU, or another accelerator with streams: copies beside the computation, ordered by events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from moebius.gpu_cache.device import Completion, Device, Launch, Transfer
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.staging import StagedTransfer, Staging
from moebius.gpu_cache.step_buffers import StepBuffers

logger = logging.getLogger(__name__)


class Events:
    """Events of a device. Those that nobody holds any more serve again, since making one takes a call of the driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._free: list[Any] = []

    def record(self, stream: Any) -> Any:
        """An event that `stream` reaches after all that it was given so far."""
        try:
            event = self._free.pop()
        except IndexError:
            event = self._driver.event()
        event.record(stream)
        return event

    def take_back(self, *events: Any) -> None:
        """What waits for them already does not mind if they are recorded anew."""
        self._free.extend(events)


class StreamTransfer(Transfer):
    """Work between two events of its stream, in so many parts; a device error raises where it is noticed."""

    error = None

    def __init__(self, begin: Any, end: Any, stream: Any, events: Events, parts: int = 1) -> None:
        self.event = end
        self._begin, self._stream, self._events, self._parts = begin, stream, events, parts

    def __del__(self) -> None:
        self._events.take_back(self._begin, self.event)

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def elapsed_us(self) -> float:
        return self._begin.elapsed_time(self.event) * 1e3 / self._parts

    def span(self) -> tuple[float, float] | None:
        if not self.done():
            return None
        present = self._events.record(self._stream)  # events know only how far apart they are
        present.synchronize()
        now = perf_counter()
        spans = [event.elapsed_time(present) / 1e3 for event in (self._begin, self.event)]
        self._events.take_back(present)
        return now - spans[0], now - spans[1]


class StreamLaunch(Launch):
    """A result that becomes valid on its stream; other streams wait for the event, the host for nothing."""

    def __init__(
        self, completion: StreamTransfer, output: torch.Tensor, stream: Any, current_stream: Callable[[], Any]
    ) -> None:
        self.completion: StreamTransfer = completion
        self._output, self._stream, self._current_stream = output, stream, current_stream

    def result(self) -> torch.Tensor:
        current = self._current_stream()
        if current != self._stream:
            current.wait_event(self.completion.event)
            self._output.record_stream(current)
        return self._output


class AcceleratorDevice(Device):
    """Computation runs on the caller's current stream, copies on two of our own: admissions and prefetches, and demand.

    Host memory is pinned in place, so that a copy costs the host no more than handing it over. Where that is refused,
    copies go through `Staging`.

    Args:
        driver: of an available device.
    """

    def __init__(self, driver: Driver) -> None:
        self.torch_device = driver.device
        self._driver, self._events = driver, Events(driver)
        self._background, self._urgent = driver.stream(), driver.stream(priority=-1)
        self._staging = Staging(driver)
        self._pinned: set[int] = set()  # addresses of the storages whose pages are pinned
        self._registered: dict[int, torch.Tensor] = {}  # those of them that we have pinned

    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a pool made inside could not be written outside
            pool = self._driver.empty(slots, nbytes)
        # The memory may have been freed by work that is still queued on the current stream.
        for stream in (self._background, self._urgent):
            stream.wait_stream(self._driver.current_stream())
        return pool

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        return self.copy_all([target], [source], [after], urgent)[0]

    def copy_all(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        after: Sequence[Completion | None],
        urgent: bool,
    ) -> Sequence[Transfer]:
        if sources[0].untyped_storage().data_ptr() in self._pinned:
            return [self._send(targets, sources, after, urgent)] * len(targets)
        return [self._staged(*one, urgent) for one in zip(targets, sources, after, strict=True)]

    def _staged(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        return self._staging.copy(source, lambda buffer: self._send([target], [buffer], [after], urgent), urgent)

    def _send(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        after: Sequence[Completion | None],
        urgent: bool,
    ) -> StreamTransfer:
        """One copy after the other, when all that still reads the slots has ended."""
        stream = self._urgent if urgent else self._background
        with self._driver.on(stream):
            for reader in dict.fromkeys(after):
                if reader is not None:
                    assert isinstance(reader, StreamTransfer)
                    stream.wait_event(reader.event)
            begin = self._events.record(stream)
            for target, source in zip(targets, sources, strict=True):
                self._driver.copy(target, source)
            return StreamTransfer(begin, self._events.record(stream), stream, self._events, len(targets))

    def finish_copies(self) -> None:
        self._staging.finish()
        for stream in (self._urgent, self._background):
            stream.synchronize()

    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        with self._driver.on_device():
            stream = self._driver.current_stream()
            for upload in after:
                assert isinstance(upload, StreamTransfer | StagedTransfer)
                stream.wait_event(upload.event)
            begin = self._events.record(stream)
            output = work()
            completion = StreamTransfer(begin, self._events.record(stream), stream, self._events)
            return StreamLaunch(completion, output, stream, self._driver.current_stream)

    def pin(self, host: torch.Tensor) -> bool:
        address = host.untyped_storage().data_ptr()
        if self._driver.is_pinned(host):
            self._pinned.add(address)
            return False  # by its owner, who unpins it
        refusal = self._driver.register(host)
        if refusal is None:
            self._pinned.add(address)
            self._registered[address] = host
            return True
        self._reserve(host.shape[-1])
        if self.refusal is None:
            self.refusal = refusal
            logger.warning("host memory of experts could not be pinned (%s): uploads to the GPU are slower", refusal)
        return False

    def _reserve(self, nbytes: int) -> None:
        """Have buffers for staging, even where registered pages took all that the system lets anybody pin (Windows)."""
        while True:
            try:
                return self._staging.reserve(nbytes)
            except RuntimeError:
                if not self._registered:
                    raise
            last = next(reversed(self._registered.values()))
            self.unpin(last)
            nbytes = max(nbytes, last.shape[-1])

    def unpin(self, host: torch.Tensor) -> None:
        if self._registered.pop(host.untyped_storage().data_ptr(), None) is None:
            return  # given back already
        try:
            self._driver.synchronize()  # no copy may be reading it
        finally:
            if (refusal := self._driver.unregister(host)) is not None:
                logger.warning("host memory of experts stays pinned (%s)", refusal)
            self._pinned.discard(host.untyped_storage().data_ptr())

    def step_buffers(self, nbytes: int) -> StepBuffers:
        return StepBuffers(self._driver, nbytes)

    def free_memory(self) -> int:
        return self._driver.free_memory()

    def trim(self) -> None:
        self._driver.trim()

    def close(self) -> None:
        self._staging.close()
        self._driver.synchronize()
