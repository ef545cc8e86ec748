"""The calls of torch that need an accelerator, in one place: tests put others in their stead, which need none."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices, not for the one alone that registers the pages


class Driver:
    """torch's calls for one device. Streams and events are those of its device module: ``torch.cuda``, ``torch.xpu``.

    Args:
        device: an available device with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)

    def stream(self, priority: int = 0) -> Any:
        """A new stream; lower numbers go first."""
        return self._module.Stream(device=self.device, priority=priority)

    def current_stream(self) -> Any:
        """The stream that the caller's operations go to."""
        return self._module.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Operations within go to `stream`, whatever device the thread is on."""
        return self._module.stream(stream)

    def on_device(self) -> AbstractContextManager[Any]:
        """Operations within are on this device, and keep its current stream."""
        return self._module.device(self.device)

    def event(self) -> Any:
        """An event that knows when it was reached."""
        return self._module.Event(enable_timing=True)

    def empty(self, slots: int, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 [slots, nbytes]."""
        return torch.empty(slots, nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Pinned host memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy to the device on the current stream; the host does not wait if `source` is pinned."""
        target.copy_(source, non_blocking=True)

    def fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from the device to pinned host memory on the current stream; the host does not wait."""
        target.copy_(source, non_blocking=True)

    def is_pinned(self, host: torch.Tensor) -> bool:
        """Whether the driver knows these pages."""
        return host.is_pinned()

    def register(self, host: torch.Tensor) -> str | None:
        """Pin the pages of a host tensor in place; why not, where this is refused."""
        if not hasattr(self._module, "cudart"):
            return f"torch registers no host memory for {self.device.type}"
        with self.on_device():  # else the first device gets a context, and hundreds of MB with it, for another's sake
            code = self._module.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, _PORTABLE)
        return self._refusal(f"cudaHostRegister of {host.nbytes:,} bytes", code)

    def unregister(self, host: torch.Tensor) -> str | None:
        """Undo `register`; why not, where this is refused."""
        with self.on_device():
            code = self._module.cudart().cudaHostUnregister(host.data_ptr())
        return self._refusal(f"cudaHostUnregister of {host.nbytes:,} bytes", code)

    def _refusal(self, call: str, code: Any) -> str | None:
        if int(code) == 0:
            return None
        with suppress(RuntimeError):  # takes the refusal off the driver's books, else the next kernel reports it
            torch.zeros(1, device=self.device)
        return f"{call} returned {int(code)}: {self._module.cudart().cudaGetErrorString(code)}"

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        self._module.synchronize(self.device)

    def trim(self) -> None:
        """Give device memory back that torch's allocator holds but does not use."""
        self._module.empty_cache()

    def free_memory(self) -> int:
        """Free on the device, plus what torch's allocator holds but does not use."""
        free, _ = self._module.mem_get_info(self.device)
        reserved = self._module.memory_reserved(self.device)
        return int(free + reserved - self._module.memory_allocated(self.device))
