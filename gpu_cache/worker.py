"""A background thread with a queue: the emulated device's streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter

import torch

from moebius.gpu_cache.device import Completion, Launch, Transfer


class Signal(Transfer):
    """Set by the thread when a job ends."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._span: tuple[float, float] | None = None
        self.ended_at = 0.0  # `monotonic`, once it is done

    def set(self, error: BaseException | None = None, span: tuple[float, float] | None = None) -> None:
        self._error, self._span, self.ended_at = error, span, monotonic()
        self._ended.set()

    def elapsed_us(self) -> float:
        begun, ended = self._span or (0.0, 0.0)
        return (ended - begun) * 1e6

    def span(self) -> tuple[float, float] | None:
        return self._span

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        self._ended.wait()

    @property
    def error(self) -> BaseException | None:
        return self._error


class Job(Launch):
    """Work for a thread, which begins when the completions `after` are done."""

    def __init__(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> None:
        self._work: Callable[[], torch.Tensor] | None = work
        self._after = after
        self._output: torch.Tensor | None = None
        self.completion: Signal = Signal()

    def run(self) -> None:
        assert self._work is not None
        error: BaseException | None = None
        span: tuple[float, float] | None = None
        try:
            for earlier in self._after:
                earlier.wait()
            begun = perf_counter()
            self._output = self._work()
            span = begun, perf_counter()
        except BaseException as raised:  # noqa: BLE001 (kept for whoever waits)
            error = raised
        self._work, self._after = None, ()  # the tensors they hold
        self.completion.set(error, span)

    def result(self) -> torch.Tensor:
        self.completion.wait()
        if self.completion.error is not None:
            raise self.completion.error
        assert self._output is not None
        return self._output


class _Queue:
    """What the thread sees; it does not know the `Worker`, which can therefore be collected."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.stopping = threading.Event()

    def serve(self) -> None:
        while (job := self._take()) is not None:
            job.run()
            del job  # an idle thread keeps nothing alive

    def _take(self) -> Job | None:
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.stopping.is_set())
            return None if self.stopping.is_set() else self.jobs.popleft()


class Worker:
    """One thread that runs jobs in order; it starts with the first job and again after `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: _Queue | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, first: bool = False) -> None:
        """Queue a job, before all others where `first` is set."""
        if self._queue is None:
            queue = _Queue()
            thread = threading.Thread(target=queue.serve, name=self._name, daemon=True)
            thread.start()
            self._queue, self._thread = queue, thread  # not before: an interrupt would leave a queue that nobody serves
        with self._queue.changed:
            (self._queue.jobs.appendleft if first else self._queue.jobs.append)(job)
            self._queue.changed.notify()

    def drain(self) -> None:
        """Wait until the jobs queued so far have ended."""
        if self._queue is not None:
            last = Job(lambda: torch.empty(0, device="cpu"), ())
            self.submit(last)
            last.completion.wait()

    def pause(self, seconds: float) -> bool:
        """From within a job: wait without burning CPU; True if the worker is being closed."""
        return self._queue is not None and self._queue.stopping.wait(seconds)

    def close(self) -> None:
        """End the running job, cancel the queued ones and give the thread back. Idempotent."""
        if self._queue is None or self._thread is None:
            return
        with self._queue.changed:
            self._queue.stopping.set()
            self._queue.changed.notify()
        self._thread.join()
        for job in self._queue.jobs:
            job.completion.set(RuntimeError("the device was closed before this work began"))
        self._queue = self._thread = None
