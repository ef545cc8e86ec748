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
                self._there: torch.Tensor = driver.empty(1, nbytes)[0]
                self._here, self._sums = driver.pinned(nbytes), driver.pinned(nbytes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the driver pins no {nbytes:,} bytes of host memory, through which each layer's inputs and outputs "
                "cross; raise the limit of locked memory (ulimit -l), or use device='cpu'"
            ) from error
        self._sum: torch.Tensor = torch.empty(0)  # the view of them that the last step used
        self._plans: dict[Any, _Plan] = {}  # by shapes and dtypes
        self._stream: Any = None
        self._sending: Any = None  # the stream that may still read the sums

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
            if nbytes > len(self._here):
                here = self._driver.pinned(nbytes)
                return _Plan(order, self._driver.empty(1, nbytes)[0], here, _views(here, tensors, order))
            here = self._here[:nbytes]
            plan = _Plan(order, self._there[:nbytes], here, _views(here, tensors, order))
        if len(self._plans) == _PLANS:
            self._plans.clear()
        return self._plans.setdefault(key, plan)

    def zeros(self, rows: int, width: int) -> torch.Tensor:
        """Pinned zeros fp32 [rows, width], for `to_device`."""
        if self._sending is not None:  # no `to_host` has waited for it since
            self._sending.synchronize()
        if self._sum.shape != (rows, width):
            nbytes = 4 * rows * width
            with torch.inference_mode(False):
                memory = self._sums[:nbytes] if nbytes <= len(self._sums) else self._driver.pinned(nbytes)
                self._sum = memory.view(torch.float32).view(rows, width)
        return self._sum.zero_()

    def to_device(self, total: torch.Tensor) -> torch.Tensor:
        """The sum, from `zeros` of this step, on the device; the host does not wait."""
        target = torch.empty(total.shape, dtype=total.dtype, device=self._driver.device)
        self._driver.copy(target.view(-1).view(torch.uint8), total.view(-1).view(torch.uint8))
        self._sending = self._driver.current_stream()
        return target


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
