"""Worker threads that live inside one compiled function and are handed jobs through shared memory.

The caller works too and never needs a worker to come: units that nobody else took are its own, so a worker that wakes
late costs nothing. A worker counts itself inside before it looks whether the job is still open, and the caller closes
the job before it looks whether anyone is inside; sequential consistency leaves no gap between the two.
"""

from __future__ import annotations

from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    call,
    futex_wait,
    futex_wake,
    pause,
    wait_briefly,
)

# Words of the shared memory; those that different threads write are a cache line (8 words) apart.
TICKET, OPEN, INSIDE, SLEEPERS, STOP, FUNCTION, JOB, LIMIT = 0, 8, 16, 24, 32, 40, 41, 42
CREW_WORDS = 48
# Pauses before a worker sleeps: 20 to 50 us, about what waking a sleeper costs. Longer would steal time from the
# threads that compute attention between two calls.
_PATIENCE = 1000
_W = 8


@entry("void(int64, int64)")
def attend(crew, number):  # type: ignore[no-untyped-def]
    """A worker's life: waits for jobs of the crew at address `crew` and works on them until it is told to stop.

    `number` counts the workers from 0; a job for fewer workers is not its own.
    """
    seen, idle = 0, 0
    while True:
        ticket = atomic_load(crew + _W * TICKET)
        if atomic_load(crew + _W * STOP):
            return
        if ticket != seen:
            seen, idle = ticket, 0
            atomic_add(crew + _W * INSIDE, 1)
            if atomic_load(crew + _W * OPEN) == ticket and number < atomic_load(crew + _W * LIMIT):
                call(atomic_load(crew + _W * FUNCTION), atomic_load(crew + _W * JOB))
            atomic_add(crew + _W * INSIDE, -1)
        elif idle < _PATIENCE:
            idle += 1
            pause()
        else:
            atomic_add(crew + _W * SLEEPERS, 1)
            futex_wait(crew + _W * TICKET, seen)
            atomic_add(crew + _W * SLEEPERS, -1)


@entry("void(int64, int64, int64, int64)")
def launch(crew, function, job, workers):  # type: ignore[no-untyped-def]
    """Work on a job together with the first `workers` of the crew; returns when it is complete and none looks at it."""
    ticket = atomic_load(crew + _W * TICKET) + 1
    atomic_store(crew + _W * FUNCTION, function)
    atomic_store(crew + _W * JOB, job)
    atomic_store(crew + _W * LIMIT, workers)
    atomic_store(crew + _W * OPEN, ticket)
    atomic_store(crew + _W * TICKET, ticket)
    if atomic_load(crew + _W * SLEEPERS):
        futex_wake(crew + _W * TICKET)
    call(function, job)
    atomic_store(crew + _W * OPEN, 0)
    waited = 0
    while atomic_load(crew + _W * INSIDE):
        waited = wait_briefly(waited)


@entry("void(int64)")
def dismiss(crew):  # type: ignore[no-untyped-def]
    """Tell the workers to stop, also those that sleep."""
    atomic_store(crew + _W * STOP, 1)
    atomic_add(crew + _W * TICKET, 1)
    futex_wake(crew + _W * TICKET)


@entry("void(int64, int64)")
def alone(function, job):  # type: ignore[no-untyped-def]
    """Work on a job without a crew."""
    call(function, job)
