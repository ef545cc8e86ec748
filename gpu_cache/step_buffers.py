"""The way of a step's inputs to the host and of the CPU's sum to the device, in one copy each, through kept buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moebius.gpu_cache.driver import Driver

_PLANS = 64


class _Plan(NamedTuple):
    """How tensors of certain shapes and dtypes cross."""

    order: list[int]
    there: torch.Tensor  # uint8 [n] on the device
    here: torch.Tensor  # uint8 [n], pinned
    views: list[torch.Tensor]  # of it, as the tensors are


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
        nbytes: of a step's inputs, and of its sum, for which there is room in the buffers.

    Raises:
        RuntimeError: the driver pins no memory.
    """

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        try:
            with torch.inference_mode(False):  # what is made inside cannot be written outside
                self._there: torch.Tensor = driver.empty(2, nbytes)  # inputs, sum
                self._here = driver.pinned(nbytes), driver.pinned(nbytes)
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
        torch.cat(_bytes_of(tensors, plan.order), out=plan.there)
        self._driver.fetch(plan.here, plan.there)
        stream.synchronize()
        self._sending = None
        return list(plan.views)

    def _plan(self, tensors: Sequence[torch.Tensor]) -> _Plan:
        """Where such tensors cross; decode asks for the same in every layer."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if (plan := self._plans.get(key)) is not None:
            return plan
        nbytes, order = sum(tensor.nbytes for tensor in tensors), _order(tensors)
        with torch.inference_mode(False):
            there, here = self._memory(0, nbytes)
            plan = _Plan(order, there, here, _views(here, tensors, order))
        if nbytes <= len(self._here[0]):
            if len(self._plans) == _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _memory(self, number: int, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many bytes on the device and in pinned memory: the buffers' where there is room."""
        if nbytes <= len(self._here[number]):
            return self._there[number, :nbytes], self._here[number][:nbytes]
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


def _order(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Wide elements first, so that each tensor begins at a multiple of its own."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)


def _bytes_of(tensors: Sequence[torch.Tensor], order: Sequence[int]) -> list[torch.Tensor]:
    return [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]


def _views(memory: torch.Tensor, tensors: Sequence[torch.Tensor], order: Sequence[int]) -> list[torch.Tensor]:
    found, begin = list(tensors), 0
    for i in order:
        end = begin + tensors[i].nbytes
        found[i] = memory[begin:end].view(tensors[i].dtype).view(tensors[i].shape)
        begin = end
    return found
