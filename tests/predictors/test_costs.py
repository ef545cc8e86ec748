"""The cost model: its curves, its memory, its prices. Splits are tested in tests/kernels/numba/test_split.py."""

from __future__ import annotations

import numpy as np
import pytest

from moebius.predictors.costs import KNOTS, CostModel, ExpertCost, slowdown


def test_a_curve_goes_through_its_measurements() -> None:
    """A slope per expert instead of per token, falls and negative costs out of noise."""
    cost = ExpertCost.measured((1, 4, 64), (10.0, 13.0, 73.0))
    assert cost.of(np.array([1, 2, 4, 64, 256, 0])) == pytest.approx([10, 11, 13, 73, 265, 0])
    noisy = ExpertCost.measured((1, 8, 64), (50.0, 40.0, 45.0))
    assert (noisy.of(np.array([1, 16, 500])) == 50.0).all()
    assert (ExpertCost.measured((1, 4), (-3.0, 1.0)).of(np.array([1, 2, 4])) > 0).all()


def test_a_line() -> None:
    assert ExpertCost.line(10.0, 2.0).of(np.array([1, 3, 1000])) == pytest.approx([10, 14, 2008])


def test_observations_move_the_curve_to_what_is_seen() -> None:
    """A curve that drifts, that one stalled call throws off for good, or that a call without experts moves."""
    cost = ExpertCost(np.array([11.0, 14.0, 26.0, 74.0, 266.0]), start_us=9.0)
    for _ in range(300):
        cost.observe(np.array([1, 4]), 68.0)
    assert cost.call(np.array([1, 4])) == pytest.approx(68.0, rel=1e-2)
    cost.observe(np.array([1]), 1e9)
    assert cost.call(np.array([1])) < 60.0
    before = cost.curve.copy()
    cost.observe(np.array([], int), 100.0)
    cost.observe(np.array([3]), 0.0)
    assert (cost.curve == before).all()


def test_observed_uploads_are_averaged() -> None:
    """An average that ignores what it sees, or forgets all it saw."""
    model = CostModel(ExpertCost.line(1.0, 0.0), ExpertCost.line(1.0, 0.0), upload_us=100.0)
    model.observe_upload(200.0)
    assert 100.0 < model.upload_us < 150.0
    for _ in range(200):
        model.observe_upload(40.0)
    assert model.upload_us == pytest.approx(40.0, rel=1e-2)


def test_calls_beside_copies_teach_the_slowdown_and_nothing_else() -> None:
    """A CPU that is slow because of the copies, taken for a slow CPU: then every miss would be fetched."""
    model = CostModel(ExpertCost.line(100.0, 1.0), ExpertCost.line(1.0, 0.0), upload_us=400.0)
    tokens = np.ones(4, int)
    for _ in range(200):
        model.observe_cpu(tokens, 500.0, copying_us=400.0)  # 300 us of work during the copies, 100 after
    assert model.slowdown == pytest.approx(4 / 3, rel=1e-2)
    assert model.cpu.call(tokens) == 400.0
    nothing, all_but = np.zeros(4, bool), np.array([True, False, False, False])
    assert model.finish(tokens, nothing, nothing) == 400.0
    assert model.finish(tokens, nothing, all_but) == pytest.approx(401.0, rel=1e-2)
    for _ in range(200):
        model.observe_cpu(tokens, 200.0, copying_us=0.0)
    assert model.cpu.call(tokens) == pytest.approx(200.0, rel=1e-2)


@pytest.mark.parametrize(
    ("took", "copying", "factor"), [(100, 50, 1.0), (150, 100, 2.0), (150, 1000, 1.5), (9e9, 9e9, 4.0)]
)
def test_slowdown(took: float, copying: float, factor: float) -> None:
    """Work of 100 us beside copies: not slowed down, by half for a while, throughout, and beyond belief."""
    assert slowdown(100.0, took, copying) == factor


def test_errors_are_those_of_predictions_made_before() -> None:
    """An error of what was just learned, one that never forgets, or one that hides what copies do to the CPU."""
    model = CostModel(ExpertCost.line(100.0, 0.0), ExpertCost.line(50.0, 0.0), upload_us=80.0)
    one = np.ones(1, int)
    assert [model.to_dict()[f"{name}_error"] for name in ("cpu", "gpu", "upload")] == [None] * 3
    model.observe_cpu(one, 200.0, copying_us=0.0)  # 100 were expected
    assert model.to_dict()["cpu_error"] == pytest.approx(0.5)
    expected = model.cpu.call(one)
    model.observe_cpu(one, 80.0, copying_us=0.0)
    assert model.cpu.error.mean == pytest.approx((0.5 + expected / 80 - 1) / 2)
    rng = np.random.default_rng(0)
    for factor in rng.choice([0.8, 1.25], 1000):
        model.gpu.observe(one, 50.0 * factor)
        model.observe_upload(80.0)
        model.observe_cpu(one, 3 * model.cpu.call(one), copying_us=1e6)  # copies all along: three times as slow
    assert model.gpu.error.mean == pytest.approx(0.225, abs=0.06)
    assert model.upload_error.mean == 0.0
    assert model.cpu.error.mean == pytest.approx(0.0, abs=1e-3)
    model.observe_cpu(np.zeros(0, int), 100.0, copying_us=0.0)
    assert model.cpu.error.seen == 1002


def test_price_of_an_upload() -> None:
    """What the policy weighs admissions by: uploads in units of the CPU's time for an expert, never infinite."""
    model = CostModel(ExpertCost.line(100, 10), ExpertCost.line(20, 5), 150)
    assert model.price == pytest.approx(1.5)
    model.cpu.curve *= 2
    assert model.price == pytest.approx(0.75)
    assert CostModel(ExpertCost.line(0, 0), ExpertCost.line(0, 0), 1).price < float("inf")


@pytest.mark.parametrize(("upload", "tokens"), [(50.0, 1.0), (118.0, 10.0), (1100.0, 501.0)])
def test_crossover(upload: float, tokens: float) -> None:
    """Tokens from which a copy is faster than the CPU, between the knots and beyond them."""
    assert CostModel(ExpertCost.line(100.0, 2.0), ExpertCost.line(1.0, 0.0), upload).crossover == pytest.approx(tokens)


def test_facts_are_plain_and_finite() -> None:
    """NaN and infinity are not JSON."""
    facts = CostModel(ExpertCost.line(100.0, 0.0), ExpertCost.line(1.0, 0.0), 400.0).to_dict()
    assert facts["crossover_tokens"] is None
    assert facts["cpu_us"] == [100.0] * len(KNOTS)
    assert facts["tokens"] == KNOTS.tolist()
