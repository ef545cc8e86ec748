"""Index tables of launches against loops over the routes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.routes import build_routes, select
from moebius.kernels.triton.tables import pair_table, sender, tile_table

CPU = sender(torch.device("cpu"))


def random_routes(tokens: int, top_k: int, seed: int):
    rng = np.random.default_rng(seed)
    routes = build_routes(rng.integers(-1, 7, (tokens, top_k)), rng.random((tokens, top_k), np.float32), 6)
    slots = rng.permutation(9)[: len(routes.experts)].astype(np.int32)
    slots[rng.random(len(slots)) < 0.3] = -1
    return routes, slots, select(routes, slots >= 0), slots[slots >= 0]


@settings(derandomize=True, deadline=None)
@given(tokens=st.integers(0, 9), top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_pair_table_lists_each_pair_once_under_its_token(tokens, top_k, seed):
    """A pair summed into the wrong token, twice, or never; one of an expert that is left out."""
    routes, slots, there, where = random_routes(tokens, top_k, seed)
    table = pair_table(routes, slots, tokens, CPU)
    assert table.pairs == len(there.tokens)
    slot, token, weight, order, start = np.split(table.data.numpy(), np.arange(1, 5) * table.pairs)
    assert (token == there.tokens).all()
    assert (weight.view(np.float32) == there.weights).all()
    assert (slot == [where[i] for i, count in enumerate(there.counts) for _ in range(count)]).all()
    assert sorted(order) == list(range(table.pairs))
    assert len(start) == tokens + 1
    for t in range(tokens):
        mine = order[start[t] : start[t + 1]]
        assert (token[mine] == t).all()
        assert (np.diff(mine) > 0).all(), "a token's sum has one order"


@settings(derandomize=True, deadline=None)
@given(tokens=st.integers(0, 9), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_tiles_cover_each_pair_once_and_stay_within_an_expert(tokens, rows, seed):
    """A tile that runs into the next expert would use the wrong weights."""
    routes, slots, there, where = random_routes(tokens, 3, seed)
    table = tile_table(routes, slots, rows, CPU)
    slot, first, last = table.data.numpy().reshape(3, table.tiles)
    covered = [pair for a, b in zip(first, last, strict=True) for pair in range(a, b)]
    assert covered == list(range(len(there.tokens)))
    assert ((last - first > 0) & (last - first <= rows)).all()
    for s, a, b in zip(slot, first, last, strict=True):
        (expert,) = np.flatnonzero(where == s)
        assert there.offsets[expert] <= a
        assert b <= there.offsets[expert + 1]


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_pairs(tokens):
    routes, slots = build_routes(np.full((tokens, 2), -1), np.ones((tokens, 2)), 6), np.zeros(0, np.int32)
    assert pair_table(routes, slots, tokens, CPU).data.tolist() == [0] * (tokens + 1)
    assert tile_table(routes, slots, 4, CPU).tiles == 0
