"""The router's decision, sorted by expert: what both processors receive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
        return np.diff(self.offsets)


def build_routes(ids: np.ndarray, weights: np.ndarray, num_experts: int) -> Routes:
    """Sort a layer's routing by expert.

    Args:
        ids: integer [T, k]; -1 and `num_experts` are sentinels for "no expert"; duplicates are legal.
        weights: float [T, k]; pairs of weight zero are dropped, whatever their expert would give.
        num_experts: E.

    Raises:
        ValueError: ids outside -1..E, or shapes that differ.
    """
    if ids.shape != weights.shape or ids.ndim != 2:
        raise ValueError(f"top-k ids {ids.shape} and weights {weights.shape} must have the same shape [T, k]")
    flat = ids.reshape(-1)
    if flat.size and (flat.min() < -1 or flat.max() > num_experts):
        raise ValueError(
            f"expert ids from {flat.min()} to {flat.max()} were routed, but 0..{num_experts - 1} exist "
            f"(-1 and {num_experts} mean no expert): the router and the experts do not belong together"
        )
    scale = weights.reshape(-1).astype(np.float32, copy=False)
    pairs = np.flatnonzero((flat >= 0) & (flat < num_experts) & (scale != 0))
    pairs = pairs[np.argsort(flat[pairs], kind="stable")]
    experts, counts = np.unique(flat[pairs], return_counts=True)
    offsets = np.zeros(len(experts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return Routes(experts.astype(np.int32), offsets, (pairs // ids.shape[1]).astype(np.int32), scale[pairs])


def select(routes: Routes, mask: np.ndarray) -> Routes:
    """The part of `routes` whose experts have a true entry in `mask` (bool [A])."""
    counts = routes.counts
    keep = np.repeat(mask, counts)
    offsets = np.zeros(int(mask.sum()) + 1, np.int32)
    np.cumsum(counts[mask], out=offsets[1:])
    return Routes(routes.experts[mask], offsets, routes.tokens[keep], routes.weights[keep])
