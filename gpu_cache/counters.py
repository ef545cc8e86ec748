"""What a cache has done, per layer."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the start or the last `reset`, each int64 [L], but `copy_us`, which is float64 [L]."""

    uploads: np.ndarray  # copies begun, for whatever reason
    upload_bytes: np.ndarray
    copies: np.ndarray  # completed without an error
    copy_us: np.ndarray  # microseconds that these took, without their wait for their turn
    prefetch_issued: np.ndarray  # copies begun
    prefetch_used: np.ndarray  # computed from their slot at least once
    prefetch_wasted: np.ndarray  # left their slot, or failed, before any use
    prefetch_cancelled: np.ndarray  # withdrawn before their copy began; not among the issued
    demand_fetches: np.ndarray

    @classmethod
    def zeros(cls, layers: int) -> Counters:
        dtypes = (np.float64 if field.name == "copy_us" else np.int64 for field in fields(cls))
        return cls(*(np.zeros(layers, dtype) for dtype in dtypes))

    def reset(self) -> None:
        for name in fields(self):
            getattr(self, name.name).fill(0)
