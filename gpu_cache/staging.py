"""Copies from host memory that could not be pinned: through a few pinned buffers, filled by a thread of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moebius.gpu_cache.device import Transfer
from moebius.gpu_cache.driver import Driver
from moebius.gpu_cache.worker import Job, Worker

BUFFERS = 4  # one is filled and one is sent; two more keep both busy where their speeds differ


class StagedTransfer(Transfer):
    """A copy that a thread hands to the device when a buffer holds its bytes."""

    def __init__(self, job: Job, sent: list[Any]) -> None:
        self._filled = job.completion
        self._sent = sent  # of one element, once the job has ended without an error

    @property
    def event(self) -> Any:
        """What a stream has to await. Blocks until the copy is with the device.

        Raises:
            RuntimeError: it never will be.
        """
        self._filled.wait()
        if self.error is not None:
            raise RuntimeError("an expert's upload failed, so its output is missing") from self.error
        return self._sent[0].event

    def done(self) -> bool:
        return self._filled.done() and (self.error is not None or self._sent[0].done())

    def wait(self) -> None:
        self._filled.wait()
        if self.error is None:
            self._sent[0].wait()

    @property
    def error(self) -> BaseException | None:
        return self._filled.error

    def elapsed_us(self) -> float:
        """The slower half: the next record fills a buffer while this one is sent."""
        return max(self._filled.elapsed_us(), self._sent[0].elapsed_us())

    def span(self) -> tuple[float, float] | None:
        """That of the half which is on the link."""
        return self._sent[0].span() if self.done() and self.error is None else None


class Staging:
    """A ring of pinned buffers and the thread that fills them.

    Args:
        driver: of the device.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._worker = Worker("moebius-staging")
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Any] = []  # of each buffer the last copy, or None
        self._turn = 0

    def reserve(self, nbytes: int) -> None:
        """Have buffers for records of so many bytes.

        Raises:
            RuntimeError: the driver pins no memory at all.
        """
        if self._buffers and self._buffers[0].nbytes >= nbytes:
            return
        try:
            buffers = [self._driver.pinned(nbytes) for _ in range(BUFFERS)]
        except RuntimeError as error:
            raise RuntimeError(
                f"the driver pins neither the experts' host memory nor {BUFFERS} buffers of {nbytes:,} bytes to copy "
                "them through; raise the limit of locked memory (ulimit -l), or use device='cpu'"
            ) from error
        self.finish()
        self._buffers, self._sent = buffers, [None] * BUFFERS

    def copy(self, source: torch.Tensor, send: Callable[[torch.Tensor], Any], urgent: bool) -> StagedTransfer:
        """Copy a host record (uint8 [nbytes]); `send` begins the copy of a buffer to the device and returns it."""
        sent: list[Any] = []

        def work() -> torch.Tensor:
            number, self._turn = self._turn, (self._turn + 1) % BUFFERS
            if self._sent[number] is not None:
                self._sent[number].wait()
            buffer = self._buffers[number][: source.nbytes]
            np.copyto(buffer.numpy(), source.numpy())  # releases the GIL
            self._sent[number] = send(buffer)
            sent.append(self._sent[number])
            return buffer

        job = Job(work, ())
        self._worker.submit(job, first=urgent)
        return StagedTransfer(job, sent)

    def finish(self) -> None:
        """Wait until all copies are with the device."""
        self._worker.drain()

    def close(self) -> None:
        """Drop what waits, and give the thread and the buffers back."""
        self._worker.close()
        self._buffers, self._sent = [], []
