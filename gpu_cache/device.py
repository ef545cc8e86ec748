"""What the cache needs from a device: memory for slots, copies beside the computation, launches that do not block."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moebius.gpu_cache.step_buffers import StepBuffers

_EXHAUSTED = re.compile("error.*out.of.(device.)?memory|_ALLOC_FAILED", re.IGNORECASE)


class Completion(ABC):
    """Something under way on a device."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended, well or not; does not block."""

    @abstractmethod
    def wait(self) -> None:
        """Block the caller until it has ended; does not raise its error."""

    @property
    @abstractmethod
    def error(self) -> BaseException | None:
        """Why it failed, once it is done."""


class Timed(Completion):
    """Something under way on a device whose times are known afterwards."""

    @abstractmethod
    def elapsed_us(self) -> float:
        """Microseconds that it took, without its wait for its turn, once it has ended without an error."""

    @abstractmethod
    def span(self) -> tuple[float, float] | None:
        """When it began, without its wait for its turn, and ended, in seconds of `perf_counter`; None unless it has.

        May take as long as a few calls of the driver: meant for a look back at what ran.
        """


class Transfer(Timed):
    """A copy under way, of one record or of several; `elapsed_us` is that of one of them."""


class Launch(ABC):
    """A computation under way. Its `completion` may outlive it without holding the result."""

    completion: Timed

    @abstractmethod
    def result(self) -> torch.Tensor:
        """What was computed, fp32 [T, H] on the device, safe to use from the caller's current stream.

        Raises:
            Exception: whatever the computation raised.
        """


class Device(ABC):
    """What differs between a GPU and its emulation.

    Work on one device starts in the order it was handed over, apart from urgent copies, which may overtake others.
    """

    torch_device: torch.device
    real_link = True  # whether times of copies are those of a link, and not of memory that stands for one
    # Bytes of copies that it gets ahead of time, but two copies at least, so that one follows the other without a gap.
    # They cannot be withdrawn, and demand waits for them: 16 MiB keep a 25 GB/s link busy for 0.7 ms, about a layer.
    flying_bytes = 16 << 20
    refusal: str | None = None  # why host memory is not pinned, where it should be

    @property
    def name(self) -> str:
        """As in `open_device`."""
        return str(self.torch_device)

    @abstractmethod
    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        """A pool of slots, uint8 [slots, nbytes], not initialised."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        """Start copying a host record (uint8 [nbytes]) into a slot (uint8 [nbytes]).

        Args:
            after: the last computation that reads the slot; the copy begins when it has ended.
            urgent: somebody waits for it.
        """

    def copy_all(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        after: Sequence[Completion | None],
        urgent: bool,
    ) -> Sequence[Transfer]:
        """Start copying host records of one layer into slots, each as by `copy`.

        Returns:
            Of each record the copy, which may be that of others as well: it has ended when they all have.
        """
        return [self.copy(*one, urgent) for one in zip(targets, sources, after, strict=True)]

    @abstractmethod
    def finish_copies(self) -> None:
        """Block until every copy that was ever started has ended; does not raise their errors."""

    @abstractmethod
    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        """Start `work`, which returns a tensor on the device, when the copies `after` have ended."""

    @abstractmethod
    def pin(self, host: torch.Tensor) -> bool:
        """Pin a host tensor (uint8 [E, nbytes]) in place, if the device does; True if `unpin` has to undo it.

        Raises:
            RuntimeError: neither that nor any other way to copy from it is to be had.
        """

    @abstractmethod
    def unpin(self, host: torch.Tensor) -> None:
        """Undo a successful `pin`."""

    def step_buffers(self, nbytes: int) -> StepBuffers | None:
        """Buffers for the inputs and sums, up to `nbytes`, of steps; None where tensors of the device are the host's.

        Raises:
            RuntimeError: there is no memory for them.
        """
        return None

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that could be allocated now."""

    def trim(self) -> None:  # noqa: B027 (most devices keep nothing)
        """Let others have the memory of dropped pools, where an allocator keeps it."""

    @abstractmethod
    def close(self) -> None:
        """Wait for running work, drop what is queued, give threads back. Idempotent; the device can be used again."""


def open_device(name: str, emulated_link: float | None = None) -> Device:
    """Open the device that holds the cache.

    Args:
        name: "cuda", "cuda:1" or another accelerator of torch; "emulated" for CPU tensors in its place.
        emulated_link: speed of the emulated device's link in GB/s; None copies as fast as memory allows.

    Raises:
        ValueError: the name is not that of a device with a cache, or a link speed is given for a real one.
        RuntimeError: there is no such device here.
    """
    if name == "emulated":
        from moebius.gpu_cache.emulated import EmulatedDevice

        return EmulatedDevice(emulated_link)
    if emulated_link is not None:
        raise ValueError(f"emulated_link={emulated_link} has no meaning on {name!r}; use it with device='emulated'")
    from moebius.gpu_cache.accelerator import AcceleratorDevice
    from moebius.gpu_cache.driver import Driver

    return AcceleratorDevice(Driver(_find(name)))


def full_name(name: str) -> str:
    """The name with its number, "cuda:0" for "cuda"; errors as `open_device`."""
    return name if name == "emulated" else str(_find(name))


def _find(name: str) -> torch.device:
    remedy = "use device='cpu', or device='emulated' to run the cache on CPU tensors"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is not a device of torch; {remedy}") from error
    if device.type in ("cpu", "meta"):
        raise ValueError(f"{name!r} has no memory of its own to cache experts in; {remedy}")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        raise RuntimeError(f"{name!r} was asked for, but torch {torch.__version__} found {_describe(found)}; {remedy}")
    count, index = torch.accelerator.device_count(), device.index
    if index is None:
        index = torch.accelerator.current_device_index()
    if index >= count:
        raise RuntimeError(f"{name!r} was asked for, but there are {count} {found.type} devices, numbered from 0")
    if not _has_streams(found):
        raise RuntimeError(f"{name!r} has no streams in torch, so copies would block the computation; {remedy}")
    return torch.device(device.type, index)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left, whoever says so.

    torch's allocator has an error of its own. Triton, which loads a kernel when it is first launched, raises
    ``RuntimeError("Triton Error [CUDA]: out of memory")``, torch's calls of the driver ``"CUDA error: out of memory"``,
    and libraries ``"CUBLAS_STATUS_ALLOC_FAILED when calling ..."``.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)) is not None
    )


def default_device() -> str:
    """The name of this machine's accelerator if it can hold a cache, else "cpu"; mps, without streams, cannot."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None or not _has_streams(found) else found.type


def _has_streams(device: torch.device) -> bool:
    return hasattr(torch.get_device_module(device), "Stream")


def _describe(found: torch.device | None) -> str:
    return "no accelerator (a CPU build of torch, or no driver)" if found is None else f"{found.type!r}"
