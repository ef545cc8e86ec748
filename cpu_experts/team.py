"""Torch's own threads, for models whose other layers torch computes on the same processors.

Torch's threads (OpenMP) spin for some milliseconds after each of its operations, in wait of the next, and so take
processors from threads of ours. Where torch works between two layers of experts, its team works on these too: a token
of a model of four layers then takes 26.0 ms instead of 28.4 in bf16, 19.6 instead of 20.7 in int4 (128 experts of
H = 2048, I = 768, two cores of a Zen 5). Where a device computes the rest, torch's threads sleep, and ours do not spin.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from moebius.kernels.numba import crew as kernels

Parallel = Callable[[int, int, int, int], None]
_forked = False


def run(function: int, job: int, workers: int) -> bool:
    """Work on a job (as `Crew.run`) with torch's threads, if those of the calling thread are as many and can be had.

    A team of another size would have OpenMP end and start threads in each call.

    Returns:
        Whether the job was done.
    """
    if torch.get_num_threads() != workers + 1:
        return False
    if not workers:
        kernels.alone(function, job)
        return True
    parallel = None if _forked else _parallel()
    if parallel is None:
        return False
    parallel(function, job, workers + 1, 0)
    return True


def exists() -> bool:
    """Whether torch has a team that can be asked, on this system."""
    return _parallel() is not None


@cache
def _parallel() -> Parallel | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP that torch is linked to.

    GCC calls it for ``#pragma omp parallel``, so that GNU's and LLVM's OpenMP both have it on Linux; None elsewhere.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # a handle's symbols are its own and those of what it is linked to: never another copy of OpenMP in the process
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _after_fork() -> None:
    """The child has none of the threads that its parent's OpenMP counts on, and would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
