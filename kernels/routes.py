"""The router's decision, sorted by expert: what both processors receive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moebius.kernels.numba.routing import keep_experts, sort_by_expert


class Routes(NamedTuple):
    """Token-expert pairs sorted by expert; within an expert by token, then by rank.

    Expert ``experts[i]`` serves pairs ``offsets[i]:offsets[i + 1]``; pair p adds ``weights[p]`` times that expert's
    output for token ``tokens[p]`` to the token's result.
    """

    experts: np.ndarray  # int32 [A] distinct, ascending
    offsets: np.ndarray  # int32 [A + 1]
    tokens: np.ndarray  # int32 [P]
    weights: np.ndarray  # float32 [P]

    @property
    def counts(self) -> np.ndarray:
        """Pairs of each active expert, int32 [A]."""
        return self.offsets[1:] - self.offsets[:-1]


def build_routes(ids: np.ndarray, weights: np.ndarray, num_experts: int) -> Routes:
    """Sort a layer's routing by expert.

    Args:
        ids: integer [T, k]; -1 and `num_experts` are sentinels for "no expert"; duplicates are legal.
        weights: float [T, k]; pairs of weight zero are dropped, whatever their expert would give.
        num_experts: E.

    Raises:
        TypeError: ids that are not integers.
        ValueError: ids outside -1..E, or shapes that differ.
    """
    if ids.shape != weights.shape or ids.ndim != 2:
        raise ValueError(f"top-k ids {ids.shape} and weights {weights.shape} must have the same shape [T, k]")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"top-k ids must be integers, not {ids.dtype}")
    routes = Routes(
        *sort_by_expert(np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(weights, np.float32), num_experts)
    )
    if not len(routes.offsets):
        raise ValueError(
            f"expert ids from {ids.min()} to {ids.max()} were routed, but 0..{num_experts - 1} exist "
            f"(-1 and {num_experts} mean no expert): the router and the experts do not belong together"
        )
    return routes


def select(routes: Routes, mask: np.ndarray) -> Routes:
    """The part of `routes` whose experts have a true entry in `mask` (bool [A])."""
    if mask.shape != routes.experts.shape:
        raise ValueError(f"the mask has the shape {mask.shape}, but {len(routes.experts)} experts are active")
    return Routes(*keep_experts(*routes, np.ascontiguousarray(mask, np.bool_)))
