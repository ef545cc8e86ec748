"""A step's inputs to the host, the CPU's sum and index tables to the device: one copy each, through kept buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.driver import Driver

_PLANS = 64
_ALIGNMENT = 16  # of tables: Triton compiles a kernel anew for pointers that are no multiples of 16


class _Plan(NamedTuple):
    """How tensors of certain shapes and dtypes cross."""

    there: torch.Tensor  # uint8 [n] on the device
    here: torch.Tensor  # uint8 [n], pinned
    views_there: list[torch.Tensor]  # of each, as the tensors are
    views_here: list[torch.Tensor]


class _Sum(NamedTuple):
    """The CPU's sum, fp32 [T, H], and its bytes: pinned, and on the device."""

    here: torch.Tensor
    there: torch.Tensor
    bytes_here: torch.Tensor
    bytes_there: torch.Tensor


class StepBuffers:
    """Buffers for one step at a time; what it returns holds until the next step's `to_host`.

    Steps of more than `nbytes` take memory from torch's allocators, which keep it for the next prompt.

    Args:
        driver: of the device.
        nbytes: of a step's inputs, of its sum, and of its launches' tables, for which there is room in the buffers.

    Raises:
        RuntimeError: the driver pins no memory.
    """

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        try:
            with torch.inference_mode(False):  # what is made inside cannot be written outside
                self._there: torch.Tensor = driver.empty(3, _aligned(nbytes))  # inputs, sum, tables
                self._here = [driver.pinned(_aligned(nbytes)) for _ in range(3)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the driver pins no {nbytes:,} bytes of host memory, through which each layer's inputs and outputs "
                "cross; raise the limit of locked memory (ulimit -l), or use device='cpu'"
            ) from error
        self._sum: _Sum | None = None  # of the last step that had one
        self._plans: dict[Any, _Plan] = {}  # by shapes and dtypes
        self._stream: Any = None
        self._sending: Any = None  # the stream that may still read the sum here,
        self._adding: Any = None  # and the one that reads it there
        self._launching: Any = None  # the stream whose launches read tables,
        self._sent = 0  # in so many bytes

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same in host memory, by one copy that the host waits for.

        Args:
            tensors: on the device, of any shapes and dtypes.
        """
        stream = self._driver.current_stream()
        if self._stream is not None and stream != self._stream:  # the buffers may be in use there
            stream.wait_stream(self._stream)
        self._stream = stream
        plan = self._plan(tensors)
        for view, tensor in zip(plan.views_there, tensors, strict=True):  # torch.cat of bytes takes the host longer
            view.copy_(tensor)
        self._driver.fetch(plan.here, plan.there)
        stream.synchronize()
        self._sending = None
        if self._launching == stream:
            self._launching, self._sent = None, 0
        return list(plan.views_here)

    def _plan(self, tensors: Sequence[torch.Tensor]) -> _Plan:
        """Where such tensors cross; decode asks for the same in every layer."""
        key = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        if (plan := self._plans.get(key)) is not None:
            return plan
        nbytes, order = sum(tensor.nbytes for tensor in tensors), _order(tensors)
        with torch.inference_mode(False):
            there, here = self._memory(0, nbytes)
            plan = _Plan(there, here, _views(there, tensors, order), _views(here, tensors, order))
        if nbytes <= len(self._here[0]):
            if len(self._plans) == _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _memory(self, number: int, nbytes: int, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """So many bytes on the device and in pinned memory: the buffers' from `begin` on where there is room."""
        end = begin + nbytes
        if end <= len(self._here[number]):
            return self._there[number, begin:end], self._here[number][begin:end]
        return self._driver.empty(1, nbytes)[0], self._driver.pinned(nbytes)

    def zeros(self, rows: int, width: int) -> torch.Tensor:
        """Pinned zeros fp32 [rows, width], for `to_device`."""
        if self._sending is not None:  # no `to_host` has waited for it since
            self._sending.synchronize()
        if self._sum is None or self._sum.here.shape != (rows, width):
            with torch.inference_mode(False):
                there, here = self._memory(1, 4 * rows * width)
                flat = here.view(torch.float32), there.view(torch.float32)
                self._sum = _Sum(flat[0].view(rows, width), flat[1].view(rows, width), here, there)
        return self._sum.here.zero_()

    def to_device(self, total: torch.Tensor) -> torch.Tensor:
        """The sum, from `zeros` of this step, on the device until the next one; the host does not wait."""
        assert self._sum is not None
        assert total is self._sum.here
        stream = self._driver.current_stream()
        if self._adding is not None and stream != self._adding:
            stream.wait_stream(self._adding)
        self._driver.copy(self._sum.bytes_there, self._sum.bytes_here)
        self._sending = self._adding = stream
        return self._sum.there

    def send(self, table: np.ndarray) -> torch.Tensor:
        """A launch's table (int32 [n]) on the device, for work on the current stream; the host does not wait.

        Tables stand one behind the other until the next `to_host`, by which all launches that read them have ended.
        """
        stream, nbytes, room = self._driver.current_stream(), _aligned(table.nbytes), len(self._here[2])
        if self._launching is not None and stream != self._launching:
            stream.wait_stream(self._launching)
        self._launching = stream
        if self._sent + nbytes > room >= nbytes:  # there was no `to_host` for long
            stream.synchronize()
            self._sent = 0
        with torch.inference_mode(False):
            there, here = self._memory(2, table.nbytes, self._sent)
        if nbytes <= room:
            self._sent += nbytes
        here.numpy()[:] = table.view(np.uint8)
        self._driver.copy(there, here)
        return there.view(torch.int32)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _order(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Wide elements first, so that each tensor begins at a multiple of its own."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)


def _views(memory: torch.Tensor, tensors: Sequence[torch.Tensor], order: Sequence[int]) -> list[torch.Tensor]:
    found, begin = list(tensors), 0
    for i in order:
        end = begin + tensors[i].nbytes
        found[i] = memory[begin:end].view(tensors[i].dtype).view(tensors[i].shape)
        begin = end
    return found
