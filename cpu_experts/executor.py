"""Computes experts that live in host memory, on a fixed number of threads."""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np
import torch

from moebius.cpu_experts.crew import shared
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.numba.arguments import Layer, check, new_job, prepare
from moebius.kernels.routes import Routes

# Bytes of scratch memory that stay allocated between calls; longer prompts allocate theirs for the call alone.
_KEPT_BYTES = 1 << 26


class CpuExecutor:
    """Computes the experts of any `ExpertStore`; safe to call from any number of threads.

    Calls take turns, since each uses all processors. The worker threads are torch's own, or belong to all executors of
    the process: then they start at the first call and end when the last executor is closed.

    Args:
        threads: number of threads that work on one call, the caller included.
        beside_torch: whether torch computes on the same processors between calls (see `team`).
    """

    def __init__(self, threads: int, *, beside_torch: bool = False) -> None:
        if threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, not {threads}")
        self.threads, self._beside_torch = threads, beside_torch
        self._leave = shared.join(self)
        self._job = new_job()
        self._job_address = self._job.ctypes.data
        self._scratch = np.empty(0, np.uint8)
        self._closed = False
        self._turn = threading.Lock()
        _executors.add(self)

    def run(self, store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
        """Add the routed experts' weighted outputs for x to `out`.

        Args:
            x: fp32, bf16 or fp16 [T, H], contiguous, in host memory.
            routes: pairs of tokens 0..T-1 and experts 0..E-1.
            out: fp32 [T, H], contiguous, in host memory.

        Raises:
            RuntimeError: the executor is closed.
            TypeError, ValueError: arguments of another shape, type or place, or routes out of range.
        """
        with self._turn:
            if self._closed:
                raise RuntimeError("this CpuExecutor is closed; create another")
            if store.spec.torch_code:
                _run_torch(store, x, routes, out)
            else:
                self._run_kernels(store.described, x, routes, out)

    def _run_kernels(self, layer: Layer, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
        scratch = prepare(self._job, layer, x, routes, out, self._reserve)
        if len(routes.tokens):
            shared.run(layer.work.address, self._job_address, self.threads - 1, self._beside_torch)
        del scratch  # not before the job is done

    def _reserve(self, count: int) -> np.ndarray:
        if count <= len(self._scratch):
            return self._scratch
        scratch = np.empty(count + 64, np.uint8)
        scratch = scratch[-scratch.ctypes.data % 64 :][:count]  # whole cache lines
        if count <= _KEPT_BYTES:
            self._scratch = scratch
        return scratch

    def close(self) -> None:
        """Give memory, and threads that nobody else uses, back; harmless when repeated. A call under way finishes."""
        with self._turn:
            self._closed = True
            self._leave()
            self._scratch = np.empty(0, np.uint8)


def _run_torch(store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
    check(store.spec.hidden, store.num_experts, x, routes, out)
    with torch.inference_mode():
        weights = [store.weights(int(expert)) for expert in routes.experts]
        reference.moe_forward(store.spec, weights, x, routes, out)


_executors: weakref.WeakSet[CpuExecutor] = weakref.WeakSet()


def _after_fork() -> None:
    for executor in list(_executors):
        executor._turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
