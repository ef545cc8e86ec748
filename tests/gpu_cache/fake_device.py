"""A device whose copies and computations end when a test says so: late, out of order, or with an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moebius.gpu_cache.device import Completion, Device, Launch, Timed, Transfer


class CopyError(Exception):
    """Injected."""


class FakeCopy(Transfer):
    def __init__(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None) -> None:
        self._target, self._source, self._after = target, source, after
        self._done, self._error = False, None
        self.took_us = 0.0  # what a test says

    def elapsed_us(self) -> float:
        assert self._done
        assert self._error is None
        return self.took_us

    @property
    def ready(self) -> bool:
        """Whether it may begin."""
        return self._after is None or self._after.done()

    def end(self, error: BaseException | None = None) -> None:
        """Let it complete, or fail half way."""
        assert self.ready, "a copy overwrites a slot that is still read"
        half = len(self._source) // (2 if error else 1)
        self._target.fill_(255)
        self._target[:half] = self._source[:half]
        self._done, self._error = True, error

    def done(self) -> bool:
        return self._done

    def span(self) -> tuple[float, float] | None:
        return (0.0, self.took_us / 1e6) if self._done and self._error is None else None

    def wait(self) -> None:
        if self._after is not None:
            self._after.wait()
        if not self._done:
            self.end()

    @property
    def error(self) -> BaseException | None:
        return self._error


class FakeComputation(Timed):
    def __init__(
        self, work: Callable[[], torch.Tensor], after: Sequence[Completion], before: FakeComputation | None
    ) -> None:
        self._work, self.after = work, after
        self._before = before  # computations run in order
        self.output: torch.Tensor | None = None
        self._error: BaseException | None = None

    @property
    def ready(self) -> bool:
        return all(upload.done() for upload in self.after)

    def end(self) -> None:
        self._before = None
        failed = [upload.error for upload in self.after if upload.error]
        if failed:
            self._error = failed[0]
        else:
            try:
                self.output = self._work()
            except Exception as raised:  # noqa: BLE001 (kept for whoever waits)
                self._error = raised

    def done(self) -> bool:
        return self.output is not None or self._error is not None

    def elapsed_us(self) -> float:
        return 0.0

    def span(self) -> tuple[float, float] | None:
        return None if self.output is None else (0.0, 0.0)

    def wait(self) -> None:
        if self._before is not None:
            self._before.wait()
        for upload in self.after:
            upload.wait()
        if not self.done():
            self.end()

    @property
    def error(self) -> BaseException | None:
        return self._error


class FakeLaunch(Launch):
    def __init__(self, computation: FakeComputation) -> None:
        self.completion: FakeComputation = computation

    def result(self) -> torch.Tensor:
        self.completion.wait()
        if self.completion.error:
            raise self.completion.error
        assert self.completion.output is not None
        return self.completion.output


class FakeDevice(Device):
    """Nothing ends by itself; `wait` lets it end. New slots, and slots whose copy has begun, are NaN in any format.

    Args:
        room: bytes that can be allocated.
        refuse: make every copy raise at once.
    """

    torch_device = torch.device("cpu")

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.refuse = False
        self.closed = 0
        self.pinned: list[int] = []
        self._copies: list[FakeCopy] = []
        self._computations: list[FakeComputation] = []

    @property
    def copies(self) -> list[FakeCopy]:
        """Under way."""
        return [copy for copy in self._copies if not copy.done()]

    @property
    def computations(self) -> list[FakeComputation]:
        """Under way, in order."""
        return [computation for computation in self._computations if not computation.done()]

    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        if slots * nbytes > self.room:
            raise RuntimeError("injected: out of memory")
        return torch.full((slots, nbytes), 255, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        if self.refuse:
            raise CopyError("refused")
        copy = FakeCopy(target, source, after)
        if copy.ready:
            target.fill_(255)
        self._copies = [*self.copies, copy]
        return copy

    def finish_copies(self) -> None:
        for copy in self.copies:
            copy.wait()

    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        before = self.computations
        computation = FakeComputation(work, after, before[-1] if before else None)
        self._computations = [*before, computation]
        return FakeLaunch(computation)

    def pin(self, host: torch.Tensor) -> bool:
        self.pinned.append(host.data_ptr())
        return True

    def unpin(self, host: torch.Tensor) -> None:
        assert self.closed, "memory is unpinned while copies may read it"
        self.pinned.remove(host.data_ptr())

    def free_memory(self) -> int:
        return self.room

    def close(self) -> None:
        self.closed += 1
