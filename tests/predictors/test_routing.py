"""Routing predictors and the record of how right they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.predictors.routing import MAX_TOKENS, PREDICTORS, Accuracy, NextGate, NoPrediction


def _two_largest(weight: Tensor) -> NextGate:
    return NextGate([lambda: None, lambda: lambda x: (x @ weight.T).topk(2).indices])


def test_next_gate_gives_the_distinct_experts_of_the_next_layer() -> None:
    """Catches a gate of the same layer, repeated experts, and scores instead of ids."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(5, 16, generator=generator)
    expected = sorted({int(e) for row in x.double() @ weight.double().T for e in row.topk(2).indices})
    predicted = _two_largest(weight).predict(0, x)
    assert predicted is not None
    assert predicted.dtype == np.int32
    assert predicted.tolist() == expected


@pytest.mark.parametrize(("layer", "tokens"), [(1, 3), (7, 3), (0, 0), (0, MAX_TOKENS + 1)])
def test_nothing_is_foreseen(layer: int, tokens: int) -> None:
    """Catches a prediction past the last layer, for nothing, and for prompts that use most experts anyway."""
    assert _two_largest(torch.eye(8)).predict(layer, torch.ones(tokens, 8)) is None


def test_a_gate_may_become_known_later() -> None:
    """Catches gates that are asked for once, when no layer has run yet."""
    known: list[object] = []
    predictor = NextGate([lambda: None, lambda: known[0] if known else None])  # type: ignore[arg-type,return-value]
    assert predictor.predict(0, torch.ones(1, 4)) is None
    known.append(lambda x: torch.tensor([[3, 1, 3]]))
    assert predictor.predict(0, torch.ones(1, 4)).tolist() == [1, 3]  # type: ignore[union-attr]


def test_no_prediction_foresees_nothing() -> None:
    """Catches a predictor that works although it is off."""
    assert NoPrediction().predict(0, torch.ones(1, 4)) is None
    assert set(PREDICTORS) == {"next_gate", "none"}


steps = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 7), st.booleans(), max_size=8),  # predicted -> resident
        st.sets(st.integers(0, 7)),  # used
    ),
    max_size=20,
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(steps)
def test_accuracy_counts_as_sets_do(history: list[tuple[dict[int, bool], set[int]]]) -> None:
    """Catches recall and precision that are mixed up, and residency of the wrong expert."""
    accuracy = Accuracy()
    right = absent = absent_right = 0
    for predicted, used in history:
        experts, resident = np.array(list(predicted), np.int32), np.array(list(predicted.values()), bool)
        accuracy.record(experts, resident, np.array(sorted(used), np.int32))
        missing = {expert for expert, there in predicted.items() if not there}
        right += len(set(predicted) & used)
        absent += len(missing)
        absent_right += len(missing & used)
    foreseen, needed = sum(len(p) for p, _ in history), sum(len(u) for _, u in history)
    assert (accuracy.predicted, accuracy.right, accuracy.used) == (foreseen, right, needed)
    assert (accuracy.absent, accuracy.absent_right) == (absent, absent_right)
    assert accuracy.recall == pytest.approx(right / needed if needed else float("nan"), nan_ok=True)
    assert accuracy.precision_absent == pytest.approx(absent_right / absent if absent else float("nan"), nan_ok=True)
