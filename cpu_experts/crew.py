"""The threads that work on a job beside the thread that posts it."""

from __future__ import annotations

import os
import platform
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np

from moebius.cpu_experts import team
from moebius.kernels.numba import crew as kernels
from moebius.kernels.numba.memory import FUTEX


class ResidentCrew:
    """Workers that stay in compiled code between jobs and sleep on a futex when idle (Linux)."""

    def __init__(self) -> None:
        self._finalizer: weakref.finalize | None = None
        self._renew()
        _crews.add(self)

    def run(self, function: int, job: int, workers: int) -> None:
        """Work on a job with workers, which are started when they are needed first; one call at a time.

        Args:
            function: address of the C function ``void f(int64 job)``, which takes units until none is left.
            job: its argument.
            workers: threads beside the caller that may work on it.
        """
        if not workers:
            kernels.alone(function, job)
            return
        if len(self._threads) < workers:
            self._start(workers)
        kernels.launch(self._address, function, job, workers)

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
        self._address, self._threads = self._state.ctypes.data, list[threading.Thread]()

    def _start(self, workers: int) -> None:
        kernels.launch.compiled, kernels.attend.compiled, kernels.dismiss.compiled  # noqa: B018 (compile before threads)
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _dismiss, self._state, self._threads)
        for number in range(len(self._threads), workers):
            thread = _thread(_attend, self._state, number)
            self._threads.append(thread)
            thread.start()


class WaitingCrew:
    """Workers that wait in Python, for systems without a futex; same protocol, slower hand-over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._job: tuple[int, int] | None = None
        self._ticket, self._pending, self._limit, self._stop = 0, 0, 0, False
        _crews.add(self)

    def run(self, function: int, job: int, workers: int) -> None:
        kernels.alone.compiled  # noqa: B018 (compile before any thread needs it)
        for number in range(len(self._threads), workers):
            self._threads.append(_thread(self._attend, number, self._ticket))
            self._threads[-1].start()
        with self._changed:
            self._job, self._pending, self._limit = (function, job), workers, workers
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
        self.__init__()  # type: ignore[misc]

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

    def _attend(self, number: int, seen: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._ticket != seen)  # noqa: B023 (read under the lock)
                if self._stop:
                    return
                seen, job, limit = self._ticket, self._job, self._limit
            if number >= limit:
                continue
            assert job is not None
            kernels.alone(*job)
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()


Crew = ResidentCrew | WaitingCrew


def make_crew() -> Crew:
    """The crew for this system."""
    if sys.platform == "linux" and platform.machine() in FUTEX:
        return ResidentCrew()
    return WaitingCrew()


class SharedCrew:
    """The crew of all executors of the process: their calls take turns, and its threads end with the last of them."""

    def __init__(self) -> None:
        self._crew, self._users = make_crew(), 0
        self._turn = threading.RLock()  # a finalizer of another executor may run in the thread that holds it

    def join(self, user: object) -> weakref.finalize:
        """Count `user` in until the result is called, or `user` is forgotten."""
        with self._turn:
            self._users += 1
        return weakref.finalize(user, self._leave)

    def run(self, function: int, job: int, workers: int, beside_torch: bool) -> None:
        """As `Crew.run`, from any thread; with torch's threads where they spin beside ours and can do it."""
        with self._turn:
            if not (beside_torch and team.run(function, job, workers)):
                self._crew.run(function, job, workers)

    def _leave(self) -> None:
        with self._turn:
            self._users -= 1
            if not self._users:
                self._crew.close()

    def forget(self) -> None:
        """After a fork: another thread of the parent may have held the lock."""
        self._turn = threading.RLock()


def _thread(target: Callable[..., None], *args: object) -> threading.Thread:
    return threading.Thread(target=target, args=args, name="moebius-cpu", daemon=True)


def _attend(state: np.ndarray, number: int) -> None:
    kernels.attend(state.ctypes.data, number)


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
shared = SharedCrew()


def _after_fork() -> None:
    shared.forget()
    for crew in list(_crews):
        crew.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
