"""The threads that work on a job beside the thread that posts it."""

from __future__ import annotations

import os
import platform
import sys
import threading
import weakref

import numpy as np

from moebius.kernels.numba import crew as kernels
from moebius.kernels.numba.memory import FUTEX


class ResidentCrew:
    """Workers that stay in compiled code between jobs and sleep on a futex when idle (Linux).

    Args:
        workers: threads beside the caller, started at the first job.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._finalizer: weakref.finalize | None = None
        self._renew()
        _crews.add(self)

    def run(self, function: int, job: int) -> None:
        """Work on a job with the workers; one call at a time.

        Args:
            function: address of the C function ``void f(int64 job)``, which takes units until none is left.
            job: its argument.
        """
        if not self.workers:
            kernels.alone(function, job)
            return
        if self._finalizer is None:
            self._start()
        kernels.launch(self._address, function, job)

    def close(self) -> None:
        """End the workers; a later `run` starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
            self._renew()

    def forget(self) -> None:
        """After a fork: the workers live in the parent only."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._renew()

    def _renew(self) -> None:
        self._state, self._finalizer = _aligned_words(kernels.CREW_WORDS), None
        self._address = self._state.ctypes.data

    def _start(self) -> None:
        kernels.launch.compiled, kernels.attend.compiled, kernels.dismiss.compiled  # noqa: B018 (compile before threads)
        threads = [
            threading.Thread(target=_attend, args=(self._state,), name=f"moebius-cpu-{i}", daemon=True)
            for i in range(self.workers)
        ]
        self._finalizer = weakref.finalize(self, _dismiss, self._state, threads)
        for thread in threads:
            thread.start()


class WaitingCrew:
    """Workers that wait in Python, for systems without a futex; same protocol, slower hand-over."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._job: tuple[int, int] | None = None
        self._ticket, self._pending, self._stop = 0, 0, False
        _crews.add(self)

    def run(self, function: int, job: int) -> None:
        kernels.alone.compiled  # noqa: B018 (compile before any thread needs it)
        if not self._threads:
            self._start()
        with self._changed:
            self._job, self._pending = (function, job), len(self._threads)
            self._ticket += 1
            self._changed.notify_all()
        try:
            kernels.alone(function, job)
        finally:
            self._drain()

    def close(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads, self._stop = [], False

    def forget(self) -> None:
        """After a fork: the workers live in the parent only."""
        self.__init__(self.workers)  # type: ignore[misc]

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=self._attend, args=(self._ticket,), name=f"moebius-cpu-{i}", daemon=True)
            for i in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()

    def _drain(self) -> None:
        """Wait until no worker uses the job's memory any more, whatever signals arrive meanwhile."""
        interrupt: KeyboardInterrupt | None = None
        while self._pending:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._pending)
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _attend(self, seen: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._ticket != seen)  # noqa: B023 (read under the lock)
                if self._stop:
                    return
                seen, job = self._ticket, self._job
            assert job is not None
            kernels.alone(*job)
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()


Crew = ResidentCrew | WaitingCrew


def make_crew(workers: int) -> Crew:
    """The crew for this system, with `workers` threads beside the caller."""
    if sys.platform == "linux" and platform.machine() in FUTEX:
        return ResidentCrew(workers)
    return WaitingCrew(workers)


def _attend(state: np.ndarray) -> None:
    kernels.attend(state.ctypes.data)


def _dismiss(state: np.ndarray, threads: list[threading.Thread]) -> None:
    kernels.dismiss(state.ctypes.data)
    for thread in threads:
        if thread.ident is not None:  # an interrupt may have come before it was started
            thread.join()


def _aligned_words(count: int) -> np.ndarray:
    """Zeroed int64 words that begin at a cache line."""
    words = np.zeros(count + 8, np.int64)
    return words[(-words.ctypes.data // 8) % 8 :][:count]


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


def _after_fork() -> None:
    for crew in list(_crews):
        crew.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
