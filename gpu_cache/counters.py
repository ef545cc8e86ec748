"""What a cache has done, per layer."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the start or the last `reset`, each int64 [L]."""

    uploads: np.ndarray  # copies begun, for whatever reason
    upload_bytes: np.ndarray
    prefetch_issued: np.ndarray
    prefetch_used: np.ndarray  # computed from their slot at least once
    prefetch_wasted: np.ndarray  # left their slot, or failed, before any use
    demand_fetches: np.ndarray

    @classmethod
    def zeros(cls, layers: int) -> Counters:
        return cls(*(np.zeros(layers, np.int64) for _ in fields(cls)))

    def reset(self) -> None:
        for name in fields(self):
            getattr(self, name.name).fill(0)
