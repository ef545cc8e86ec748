"""An accelerator in host memory: streams whose operations run late and in any order that their events allow."""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from moebius.gpu_cache.driver import Driver

POISON = 255  # NaN in any float format


class FakeEvent:
    """Reached when its stream comes to it."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self.reached = True  # an event that was never recorded holds nobody up, as in CUDA
        self._stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        with self._driver.lock:
            self.reached, self._stream = False, stream
            stream.add(self._reach)

    def _reach(self) -> None:
        self.reached = True

    def query(self) -> bool:
        self._driver.make_progress()
        return self.reached

    def synchronize(self) -> None:
        with self._driver.lock:
            while not self.reached:
                assert self._stream is not None
                self._stream.run_one()

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.reached
        assert end.reached
        return 0.01


class FakeStream:
    """Operations in order. The one of the host's own thread is at once: it waits for what they wait for."""

    def __init__(self, driver: FakeDriver, at_once: bool = False) -> None:
        self._driver, self._at_once = driver, at_once
        self.operations: deque[Callable[[], object] | FakeEvent] = deque()

    def add(self, operation: Callable[[], object] | FakeEvent) -> None:
        self.operations.append(operation)
        while self._at_once and self.operations:
            self.run_one()

    def run_one(self) -> None:
        """Run the next operation, after what it waits for."""
        operation = self.operations[0]
        if isinstance(operation, FakeEvent):
            operation.synchronize()
        if self.operations and self.operations[0] is operation:
            self.operations.popleft()
            if not isinstance(operation, FakeEvent):
                operation()

    @property
    def ready(self) -> bool:
        first = self.operations[0] if self.operations else None
        return first is not None and (not isinstance(first, FakeEvent) or first.reached)

    def wait_event(self, event: FakeEvent) -> None:
        with self._driver.lock:
            self.add(event)

    def wait_stream(self, stream: FakeStream) -> None:
        event = FakeEvent(self._driver)
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        with self._driver.lock:
            while self.operations:
                self.run_one()


class FakeDriver(Driver):
    """Copies run when the computation waits for them, and now and then before: never when they are handed over.

    Args:
        seed: decides which operations run early.
        refuses: addresses of host memory are not registered.
        fails: whether the n-th call (from 1) of a method fails, by the method's name and n.
    """

    def __init__(
        self, seed: int = 0, refuses: bool = False, fails: Callable[[str, int], bool] = lambda name, number: False
    ) -> None:
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        self.refuses, self.fails = refuses, fails
        self.calls: dict[str, int] = {}
        self.registered: set[int] = set()
        self.kept = 0  # bytes of pools that nobody has any more, and torch's allocator still
        self.buffers: set[int] = set()
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()  # memory that somebody still has
        self._random = random.Random(seed)
        self._streams: list[FakeStream] = []
        self._main = FakeStream(self, at_once=True)
        self._here = threading.local()

    def _count(self, name: str) -> bool:
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.fails(name, self.calls[name])

    def make_progress(self) -> None:
        """Some operation, sometimes."""
        with self.lock:
            ready = [stream for stream in self._streams if stream.ready]
            if ready and self._random.random() < 0.3:
                self._random.choice(ready).run_one()

    def stream(self, priority: int = 0) -> FakeStream:
        self._streams.append(FakeStream(self))
        return self._streams[-1]

    def current_stream(self) -> FakeStream:
        return getattr(self._here, "stream", self._main)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        former, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = former

    @contextmanager
    def on_device(self) -> Iterator[None]:
        yield

    def event(self) -> FakeEvent:
        self._count("event")
        return FakeEvent(self)

    def empty(self, slots: int, nbytes: int) -> torch.Tensor:
        if self._count("empty"):
            raise torch.OutOfMemoryError("injected: out of memory")
        pool = torch.full((slots, nbytes), POISON, dtype=torch.uint8)
        self.alive.add(pool)
        weakref.finalize(pool, self._keep, slots * nbytes)
        return pool

    def _keep(self, nbytes: int) -> None:
        self.kept += nbytes

    def trim(self) -> None:
        self.kept = 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        if self._count("pinned"):
            raise RuntimeError("injected: no pinned memory")
        buffer = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self.buffers.add(buffer.data_ptr())
        self.alive.add(buffer)
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        known = (
            source.untyped_storage().data_ptr() in self.registered
            or source.untyped_storage().data_ptr() in self.buffers
        )
        assert known, "a copy from pageable memory blocks the host"
        if self._count("copy"):
            raise RuntimeError("injected: copy failed")

        to, of, middle = target.numpy(), source.numpy(), len(source) // 2
        with self.lock:
            stream = self.current_stream()
            stream.add(partial(to.fill, POISON))
            stream.add(partial(np.copyto, to[:middle], of[:middle]))
            stream.add(partial(np.copyto, to[middle:], of[middle:]))
        self.make_progress()

    def fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.data_ptr() in self.buffers, "a copy to pageable memory"
        assert self.current_stream() is self._main, "before the computation has come that far"
        self._count("fetch")
        self._main.add(partial(np.copyto, target.numpy(), source.numpy()))

    def is_pinned(self, host: torch.Tensor) -> bool:
        return host.untyped_storage().data_ptr() in self.registered

    def register(self, host: torch.Tensor) -> str | None:
        if self.refuses or self._count("register"):
            return "injected: refused"
        self.registered.add(host.untyped_storage().data_ptr())
        return None

    def unregister(self, host: torch.Tensor) -> str | None:
        assert not any(stream.operations for stream in self._streams), "a copy may still read these pages"
        self.registered.remove(host.untyped_storage().data_ptr())
        return "injected: refused" if self._count("unregister") else None

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def free_memory(self) -> int:
        return 1 << 30
