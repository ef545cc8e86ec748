"""The router's decision, sorted by expert: what both processors receive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moebius.kernels.numba import routing

_ID_BYTES = {torch.int64: 8, torch.int32: 4}
_WEIGHT_KINDS = {torch.float32: routing.FP32, torch.bfloat16: routing.BF16, torch.float16: routing.FP16}


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
    _check_shapes(ids, weights)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"top-k ids must be integers, not {ids.dtype}")
    ids, weights = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(weights, np.float32)
    return _sort(ids, (ids.ctypes.data, 8, weights.ctypes.data, routing.FP32), num_experts)


def sort_routes(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Routes:
    """`build_routes` for tensors in host memory, as they are: decode does it in every layer.

    Raises:
        TypeError, ValueError: as `build_routes`, and ValueError for tensors elsewhere.
    """
    _check_shapes(ids, weights)
    if not (ids.is_cpu and weights.is_cpu):
        raise ValueError(f"top-k ids and weights must be in host memory, not on {ids.device} and {weights.device}")
    if ids.dtype not in _ID_BYTES:
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"top-k ids must be integers, not {ids.dtype}")
        ids = ids.long()
    if weights.dtype not in _WEIGHT_KINDS:
        weights = weights.float()
    ids, weights = ids.contiguous(), weights.contiguous()
    places = ids.data_ptr(), _ID_BYTES[ids.dtype], weights.data_ptr(), _WEIGHT_KINDS[weights.dtype]
    return _sort(ids, places, num_experts)


def _check_shapes(ids: np.ndarray | torch.Tensor, weights: np.ndarray | torch.Tensor) -> None:
    if ids.shape != weights.shape or ids.ndim != 2:
        raise ValueError(
            f"top-k ids {tuple(ids.shape)} and weights {tuple(weights.shape)} must have the same shape [T, k]"
        )


def _sort(ids: np.ndarray | torch.Tensor, places: tuple[int, int, int, int], num_experts: int) -> Routes:
    tokens, k = ids.shape
    numbers, weights = room(tokens * k)
    active, pairs = routing.sort_by_expert(*places, tokens, k, num_experts, numbers, weights)
    if active < 0:
        raise ValueError(
            f"expert ids from {int(ids.min())} to {int(ids.max())} were routed, but 0..{num_experts - 1} exist "
            f"(-1 and {num_experts} mean no expert): the router and the experts do not belong together"
        )
    return routes_in(numbers, weights, active, pairs)


def room(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory for routes of so many pairs, int32 [3 P + 1] and float32 [P], for compiled code to fill.

    Arrays that compiled code returns take 0.3 us each, ten times what slices do.
    """
    return np.empty(3 * pairs + 1, np.int32), np.empty(pairs, np.float32)


def routes_in(numbers: np.ndarray, weights: np.ndarray, active: int, pairs: int) -> Routes:
    """The routes of `active` experts and so many pairs with which compiled code has filled such a `room`."""
    most = len(weights)
    tokens = numbers[2 * most + 1 : 2 * most + 1 + pairs]
    return Routes(numbers[:active], numbers[most : most + active + 1], tokens, weights[:pairs])


def select(routes: Routes, mask: np.ndarray) -> Routes:
    """The part of `routes` whose experts have a true entry in `mask` (bool [A])."""
    if mask.shape != routes.experts.shape:
        raise ValueError(f"the mask has the shape {mask.shape}, but {len(routes.experts)} experts are active")
    numbers, weights = room(len(routes.tokens))
    kept = routing.keep_experts(*routes, np.ascontiguousarray(mask, np.bool_), numbers, weights)
    return routes_in(numbers, weights, *kept)
