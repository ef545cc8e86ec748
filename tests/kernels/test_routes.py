"""Sorting a layer's routing by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.routes import Routes, build_routes, select, sort_routes


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids with sentinels and duplicates, and weights with zeros of both signs and a NaN."""
    experts, tokens, k = draw(st.integers(1, 9)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(-1, experts), min_size=tokens * k, max_size=tokens * k))
    scale = st.sampled_from([0.0, -0.0, 0.25, -1.5, float("nan"), 3.0])
    weights = draw(st.lists(scale, min_size=tokens * k, max_size=tokens * k))
    dtype = draw(st.sampled_from([np.int64, np.int32]))
    return np.array(ids, dtype).reshape(tokens, k), np.array(weights, np.float32).reshape(tokens, k), experts


def _expected(ids: np.ndarray, weights: np.ndarray, experts: int) -> list[tuple[int, int, float]]:
    """(expert, token, weight) of every live pair, in the order that `Routes` promises."""
    rows, ranks = ids.shape
    pairs = [
        (int(ids[t, r]), t, r) for t in range(rows) for r in range(ranks) if 0 <= ids[t, r] < experts and weights[t, r]
    ]
    return [(e, t, float(weights[t, r])) for e, t, r in sorted(pairs)]


def _flatten(routes: Routes) -> list[tuple[int, int, float]]:
    experts = np.repeat(routes.experts, routes.counts)
    return list(zip(experts.tolist(), routes.tokens.tolist(), routes.weights.tolist(), strict=True))


def _check_form(routes: Routes) -> None:
    assert [array.dtype for array in routes] == [np.int32, np.int32, np.int32, np.float32]
    assert all(array.flags.c_contiguous for array in routes)
    assert len(routes.offsets) == len(routes.experts) + 1
    assert routes.offsets[0] == 0
    assert routes.offsets[-1] == len(routes.tokens) == len(routes.weights)
    assert (routes.counts > 0).all()
    assert (np.diff(routes.experts) > 0).all()


@settings(derandomize=True, deadline=None)
@given(routings())
def test_pairs_are_sorted_and_none_is_lost(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    """Bug: a lost or invented pair, a zero weight or a sentinel that costs work, an unstable order."""
    routes = build_routes(*case)
    _check_form(routes)
    np.testing.assert_equal(_flatten(routes), _expected(*case))


@settings(derandomize=True, deadline=None)
@given(routings(), st.data())
def test_selection_and_its_complement_make_the_whole(
    case: tuple[np.ndarray, np.ndarray, int], data: st.DataObject
) -> None:
    """Bug: an expert computed on both processors, or on neither."""
    routes = build_routes(*case)
    size = len(routes.experts)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
    chosen, others = select(routes, mask), select(routes, ~mask)
    for part, keep in ((chosen, mask), (others, ~mask)):
        _check_form(part)
        np.testing.assert_array_equal(part.experts, routes.experts[keep])
    both = sorted(map(repr, _flatten(chosen) + _flatten(others)))
    assert both == sorted(map(repr, _flatten(routes)))


@pytest.mark.parametrize("bad", [-2, 5, 2**31, -(2**40)])
def test_ids_outside_the_layer_raise(bad: int) -> None:
    """Bug: a router with more experts than the layer reads memory behind the last record."""
    with pytest.raises(ValueError, match=r"0\.\.3 exist"):
        build_routes(np.array([[0, bad]]), np.ones((1, 2), np.float32), 4)


def test_shapes_that_differ_raise() -> None:
    """Bug: weights of another batch are silently broadcast."""
    with pytest.raises(ValueError, match="same shape"):
        build_routes(np.zeros((2, 2), int), np.ones((2, 1), np.float32), 4)


def test_weights_of_other_types_and_strided_views_are_accepted() -> None:
    """Bug: a transposed or a float64 weight matrix is read as if it were contiguous float32."""
    ids, weights = np.array([[0, 1], [1, 2]]).T, np.array([[0.5, 0.25], [1.0, 2.0]]).T
    np.testing.assert_equal(_flatten(build_routes(ids, weights, 3)), _expected(ids, weights, 3))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_tensors_are_sorted_as_they_are(ids_dtype: torch.dtype, dtype: torch.dtype, strided: bool) -> None:
    """Bug: bits of another type, or of another row, taken for weights and ids."""
    ids = torch.tensor([[3, 0, 1], [0, 2, 3]]).to(ids_dtype)
    weights = torch.tensor([[0.1, -2.0, 0.0], [3e-6, 70.0, -0.0]]).to(dtype)
    expected = _expected(ids.numpy(), weights.float().numpy(), 3)
    if strided:
        ids, weights = ids.T.contiguous().T, weights.T.contiguous().T
    assert _flatten(sort_routes(ids, weights, 3)) == expected


def test_tensors_that_cannot_be_sorted_raise() -> None:
    """Bug: an address of a device, or bits of a float, read as ids."""
    ids, weights = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
    with pytest.raises(ValueError, match="must be in host memory"):
        sort_routes(ids.to("meta"), weights, 2)
    with pytest.raises(TypeError, match="must be integers"):
        sort_routes(weights, weights, 2)
    with pytest.raises(ValueError, match="from 0 to 5 were routed"):
        sort_routes(ids + torch.tensor([0, 5]), weights, 2)
    with pytest.raises(ValueError, match="same shape"):
        sort_routes(ids, weights[:, :1], 2)
