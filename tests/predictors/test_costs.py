"""The cost model: its arithmetic, its memory, and its choices against all others."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.predictors.costs import CostModel, ExpertCost

micros = st.floats(0.1, 100.0)
tokens = st.integers(1, 40)


def span(model: CostModel, misses: np.ndarray, hits: np.ndarray, fetched: np.ndarray) -> float:
    """Microseconds of a layer in which `fetched` (bool [m]) of the misses are computed on the device."""
    on_cpu = model.cpu.of(misses[~fetched]).sum()
    ready = max(model.gpu.of(hits).sum(), fetched.sum() * model.upload_us)
    return max(on_cpu, ready + model.gpu.of(misses[fetched]).sum())


def best_span(model: CostModel, misses: np.ndarray, hits: np.ndarray) -> float:
    """The shortest of all 2^m ways."""
    ways = (np.array(way, bool) for way in product([False, True], repeat=len(misses)))
    return min(span(model, misses, hits, way) for way in ways)


@st.composite
def models(draw: st.DrawFn, faster_device: bool) -> CostModel:
    cpu = ExpertCost(draw(micros), draw(micros))
    share = st.floats(0.01, 1.0)
    gpu = ExpertCost(draw(share) * cpu.base_us, draw(share) * cpu.token_us)
    return CostModel(cpu, gpu if faster_device else ExpertCost(draw(micros), draw(micros)), draw(st.floats(0.1, 500)))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(models(faster_device=False), st.integers(1, 8), tokens, st.lists(tokens, max_size=5))
def test_fetch_is_optimal_where_all_misses_are_alike(model: CostModel, m: int, each: int, hits: list[int]) -> None:
    """Catches an off-by-one in the number to fetch: in decode every miss has one token, and only the number counts."""
    misses, resident = np.full(m, each), np.array(hits, int)
    fetched = model.fetch(misses, resident)
    assert span(model, misses, resident, fetched) == pytest.approx(best_span(model, misses, resident))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(models(faster_device=True), st.lists(tokens, min_size=1, max_size=7), st.lists(tokens, max_size=5))
def test_fetch_is_near_the_optimum_on_a_faster_device(model: CostModel, m: list[int], hits: list[int]) -> None:
    """Catches sums over the wrong experts: heaviest first stays within half of the best of all subsets."""
    misses, resident = np.array(m), np.array(hits, int)
    fetched = model.fetch(misses, resident)
    assert span(model, misses, resident, fetched) <= 1.5 * best_span(model, misses, resident) + 1e-9


@settings(derandomize=True, max_examples=100, deadline=None)
@given(models(faster_device=False), st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, max_size=5))
def test_fetch_takes_the_heaviest_and_never_loses_to_taking_none(
    model: CostModel, m: list[int], hits: list[int]
) -> None:
    """Catches a mask in sorted instead of the caller's order."""
    misses, resident = np.array(m), np.array(hits, int)
    fetched = model.fetch(misses, resident)
    if fetched.any() and not fetched.all():
        assert misses[fetched].min() >= misses[~fetched].max()
    none = np.zeros(len(m), bool)
    assert span(model, misses, resident, fetched) <= span(model, misses, resident, none) + 1e-9


def test_decode_fetches_only_beyond_the_ratio_of_link_and_cpu() -> None:
    """Catches a model that fetches every miss: one copy pays from m > upload / cpu cost on."""
    model = CostModel(ExpertCost(100.0, 0.0), ExpertCost(1.0, 0.0), upload_us=350.0)
    few, many = (model.fetch(np.ones(m, int), np.empty(0, int)) for m in (3, 8))
    assert few.sum() == 0
    assert many.sum() == 1
    assert model.fetch(np.empty(0, int), np.ones(3, int)).shape == (0,)


def test_fit_goes_through_both_measurements() -> None:
    """Catches a slope per expert instead of per token, and negative costs out of noise."""
    cost = ExpertCost.fit(1, 10.0, 33, 74.0)
    assert cost.of(np.array([1, 33, 0])) == pytest.approx([10.0, 74.0, 0.0])
    noisy = ExpertCost.fit(1, 50.0, 33, 40.0)
    assert (noisy.of(np.array([1, 33])) == 50.0).all()
    steep = ExpertCost.fit(2, 1.0, 4, 100.0)
    assert (steep.of(np.array([1, 2, 4])) >= 0).all()


def test_observations_move_the_factor_to_what_is_seen() -> None:
    """Catches a factor that drifts, or that one stalled call throws off for good."""
    cost = ExpertCost(10.0, 1.0)
    for _ in range(200):
        cost.observe(np.array([1, 5]), 3 * 26.0)
    assert cost.factor == pytest.approx(3.0, rel=1e-2)
    assert cost.of(np.array([1]))[0] == pytest.approx(33.0, rel=1e-2)
    cost.observe(np.array([1]), 1e9)
    assert cost.factor < 3 * 1.5
    before = cost.factor
    cost.observe(np.array([], int), 100.0)
    cost.observe(np.array([3]), 0.0)
    assert cost.factor == before


def test_observed_uploads_are_averaged() -> None:
    """Catches an average that ignores what it sees, or forgets all it saw."""
    model = CostModel(ExpertCost(1.0, 0.0), ExpertCost(1.0, 0.0), upload_us=100.0)
    model.observe_upload(200.0)
    assert 100.0 < model.upload_us < 150.0
    for _ in range(200):
        model.observe_upload(40.0)
    assert model.upload_us == pytest.approx(40.0, rel=1e-2)


def test_price_of_an_upload() -> None:
    """What the policy weighs admissions by: uploads in units of the CPU's time for an expert, never infinite."""
    model = CostModel(ExpertCost(90, 10), ExpertCost(15, 5), 150)
    assert model.price == pytest.approx(1.5)
    model.cpu.factor = 2.0
    assert model.price == pytest.approx(0.75)
    assert CostModel(ExpertCost(0, 0), ExpertCost(0, 0), 1).price < float("inf")
