"""A GPU through torch's generic interface: streams, events and pinned memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from moebius.gpu_cache.device import Completion, Device, Launch, Transfer

logger = logging.getLogger(__name__)


class EventCompletion(Completion):
    """Ends when an event that was recorded on a stream is reached; a device error raises where it is noticed."""

    error = None

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class StreamTransfer(EventCompletion, Transfer):
    """A copy between two events of its stream."""

    def __init__(self, begin: Any, end: Any) -> None:
        super().__init__(end)
        self._begin = begin

    def elapsed_us(self) -> float:
        return self._begin.elapsed_time(self.event) * 1e3


class StreamLaunch(Launch):
    """A result that becomes valid on its stream; other streams wait for the event, the host for nothing."""

    def __init__(
        self, begin: Any, end: Any, output: torch.Tensor, stream: Any, current_stream: Callable[[], Any]
    ) -> None:
        self.completion: EventCompletion = EventCompletion(end)
        self._begin = begin
        self._output, self._stream, self._current_stream = output, stream, current_stream

    def result(self) -> torch.Tensor:
        current = self._current_stream()
        if current != self._stream:
            current.wait_event(self.completion.event)
            self._output.record_stream(current)
        return self._output

    def elapsed_ms(self) -> float | None:
        return self._begin.elapsed_time(self.completion.event) if self.completion.done() else None


class AcceleratorDevice(Device):
    """Computation runs on the caller's current stream, copies on two of our own: admissions and prefetches, and demand.

    Args:
        device: an available device with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._module = torch.get_device_module(device)  # torch.cuda (also ROCm), torch.xpu
        self._background = self._module.Stream(device=device)
        self._urgent = self._module.Stream(device=device, priority=-1)
        self._warned = False

    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a pool made inside could not be written outside
            pool = torch.empty(slots, nbytes, dtype=torch.uint8, device=self.torch_device)
        # The memory may have been freed by work that is still queued on the current stream.
        for stream in (self._background, self._urgent):
            stream.wait_stream(self._current_stream())
        return pool

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        stream = self._urgent if urgent else self._background
        with self._module.stream(stream):
            if after is not None:
                assert isinstance(after, EventCompletion)
                stream.wait_event(after.event)
            begin = self._record(stream, timed=True)
            target.copy_(source, non_blocking=True)
            return StreamTransfer(begin, self._record(stream, timed=True))

    def finish_copies(self) -> None:
        for stream in (self._urgent, self._background):
            stream.synchronize()

    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        with self._module.device(self.torch_device):
            stream = self._current_stream()
            for upload in after:
                assert isinstance(upload, EventCompletion)
                stream.wait_event(upload.event)
            begin = self._record(stream, timed=True)
            output = work()
            return StreamLaunch(begin, self._record(stream, timed=True), output, stream, self._current_stream)

    def pin(self, host: torch.Tensor) -> bool:
        """Register the pages of `host` with the driver; copies from pages it refuses block the host, at half speed."""
        if host.is_pinned():
            return False  # by its owner, who unpins it
        refusal = self._register(host)
        if refusal and not self._warned:
            logger.warning("host memory of experts could not be pinned (%s): uploads to the GPU are slower", refusal)
            self._warned = True
        return refusal is None

    def unpin(self, host: torch.Tensor) -> None:
        self._module.synchronize(self.torch_device)  # no copy may be reading it
        self._module.cudart().cudaHostUnregister(host.data_ptr())

    def free_memory(self) -> int:
        """Free on the device, plus what torch's allocator holds but does not use."""
        free, _ = self._module.mem_get_info(self.torch_device)
        reserved = self._module.memory_reserved(self.torch_device)
        return int(free + reserved - self._module.memory_allocated(self.torch_device))

    def close(self) -> None:
        self._module.synchronize(self.torch_device)

    def _register(self, host: torch.Tensor) -> str | None:
        if not hasattr(self._module, "cudart"):
            return f"torch offers no page registration for {self.torch_device.type}"
        code = int(self._module.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        if code == 0:
            return None
        with suppress(RuntimeError):  # takes the refusal off the driver's books, else the next kernel reports it
            torch.zeros(1, device=self.torch_device)
        return f"cudaHostRegister of {host.nbytes} bytes returned {code}"

    def _current_stream(self) -> Any:
        return self._module.current_stream(self.torch_device)

    def _record(self, stream: Any, timed: bool = False) -> Any:
        event = self._module.Event(enable_timing=timed)
        event.record(stream)
        return event
