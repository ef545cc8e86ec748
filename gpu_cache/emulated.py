"""The GPU path on CPU tensors: one thread stands for the copy engine, one for the compute stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
import psutil
import torch

from moebius.gpu_cache.device import Completion, Device, Launch, Transfer
from moebius.gpu_cache.worker import Job, Signal, Worker


class EmulatedDevice(Device):
    """Runs anywhere what an accelerator runs, with the same order of events.

    Args:
        link: speed of the emulated link in GB/s; None copies as fast as memory allows.
    """

    torch_device = torch.device("cpu")
    name = "emulated"

    def __init__(self, link: float | None = None) -> None:
        if link is not None and not link > 0:
            raise ValueError(f"emulated_link is {link} GB/s; give a speed above 0, or None for no limit")
        self._link = link
        self.real_link = link is not None
        self._link_free_at = 0.0
        self._copies, self._computations = Worker("moebius-copy"), Worker("moebius-compute")

    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a pool made inside could not be written by the copy thread
            return torch.empty(slots, nbytes, dtype=torch.uint8, device="cpu")

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        assert after is None or isinstance(after, Signal)
        issued = monotonic()

        def work() -> torch.Tensor:
            self._wait_for_link(issued if after is None else max(issued, after.ended_at), source.nbytes)
            np.copyto(target.numpy(), source.numpy())  # one thread, like a copy engine; releases the GIL
            return target

        job = Job(work, () if after is None else (after,))
        # Only a copy that waits for nobody may overtake: what it would wait for can wait for a copy behind it.
        self._copies.submit(job, first=urgent and (after is None or after.done()))
        return job.completion

    def finish_copies(self) -> None:
        self._copies.drain()

    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        def guarded() -> torch.Tensor:
            for upload in after:
                if upload.error is not None:
                    raise RuntimeError("an expert's upload failed, so its output is missing") from upload.error
            with torch.no_grad():  # the mode belongs to a thread
                return work()

        job = Job(guarded, after)
        self._computations.submit(job)
        return job

    def pin(self, host: torch.Tensor) -> bool:
        return False

    def unpin(self, host: torch.Tensor) -> None:
        raise RuntimeError("the emulated device pins nothing")

    def free_memory(self) -> int:
        return int(psutil.virtual_memory().available)

    def close(self) -> None:
        self._copies.close()  # first: a computation may wait for a copy
        self._computations.close()

    def _wait_for_link(self, issued: float, nbytes: int) -> None:
        if self._link is None:
            return
        self._link_free_at = max(self._link_free_at, issued) + nbytes / (self._link * 1e9)
        # No wait for the past: oversleeping is made good by the copies that follow.
        if self._copies.pause(max(0.0, self._link_free_at - monotonic())):
            raise RuntimeError("the device was closed during this copy")
