"""The ids forecaster: what it can learn, that its probabilities mean what they say, and where it says nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moebius.predictors.ids import IdsForecaster

EXCERPT = Path(__file__).parent.parent / "data" / "traces" / "gpt_oss_20b_excerpt.npz"


def follow(forecaster: IdsForecaster, token: np.ndarray) -> dict[int, np.ndarray]:
    """Pass one step's ids [L, T, k] through all layers; what was forecast for each layer."""
    said = {}
    for layer, ids in enumerate(token):
        forecaster.observe(layer, ids)
        chances = forecaster.forecast(layer, len(ids))
        if chances is not None:
            said[layer + forecaster.ahead] = chances
    return said


def test_it_learns_which_expert_follows_which_layer_to_layer():
    """A source read from the wrong layer: only layer 0 of the same token tells what layer 1 will use."""
    rng = np.random.default_rng(0)
    forecaster, mapping = IdsForecaster([8, 8], 1), rng.permutation(8)
    for _ in range(1500):
        first = rng.integers(8)
        said = follow(forecaster, np.array([[[first]], [[mapping[first]]]]))
    assert int(said[1].argmax()) == mapping[first]
    assert said[1].max() > 0.7
    assert np.delete(said[1], mapping[first]).max() < 0.1


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_it_looks_as_far_ahead_as_asked(ahead):
    """A model that peeks at layers which are not known yet when it is asked."""
    rng = np.random.default_rng(1)
    forecaster = IdsForecaster([6] * 4, 1, ahead)
    for _ in range(1500):
        first = rng.integers(6)
        token = rng.integers(6, size=(4, 1, 1))
        token[0], token[3] = first, (first + 1) % 6
        said = follow(forecaster, token)
    assert sorted(said) == list(range(ahead, 4))
    if ahead == 3:
        assert int(said[3].argmax()) == (first + 1) % 6


def test_the_token_before_counts():
    """The last source: the target layer's own past."""
    rng = np.random.default_rng(2)
    forecaster, previous = IdsForecaster([6, 6], 1), 0
    for _ in range(1500):
        previous = (previous + 1) % 6
        said = follow(forecaster, np.array([[[rng.integers(6)]], [[previous]]]))
    assert int(said[1].argmax()) == previous
    assert said[1].max() > 0.8


def test_unpredictable_use_gets_its_frequency():
    """Overconfidence: at random routing every probability must stay near k/E."""
    rng = np.random.default_rng(3)
    forecaster = IdsForecaster([16, 16], 2)
    for _ in range(2000):
        token = np.stack([rng.permutation(16)[:2] for _ in range(2)])[:, None]
        said = follow(forecaster, token)
    assert abs(float(said[1].mean()) - 2 / 16) < 0.05
    assert said[1].max() < 0.5


def test_a_batch_is_foreseen_token_by_token():
    """The chance that any token uses an expert, from tokens that do not mix."""
    rng = np.random.default_rng(4)
    forecaster = IdsForecaster([8, 8], 1)
    for _ in range(1500):
        first = rng.integers(8, size=(3, 1))
        said = follow(forecaster, np.stack([first, (first + 1) % 8]))
    used = np.unique((first + 1) % 8)
    assert said[1][used].min() > 0.8
    assert np.delete(said[1], used).max() < 0.5


def test_where_nothing_is_foreseen():
    forecaster = IdsForecaster([4, 4], 1, rows=2)
    forecaster.observe(0, np.zeros((5, 1), np.int32))
    assert forecaster.forecast(0, 5) is None
    assert forecaster.forecast(1) is None
    assert forecaster.forecast(0, 0) is None
    assert forecaster.forecast(0, 1) is not None
    forecaster.observe(1, np.full((1, 1), -1))
    with pytest.raises(ValueError, match="use 1, 2 or 3"):
        IdsForecaster([4, 4], 1, ahead=4)


def test_probabilities_on_real_routing_are_calibrated():
    """Expected calibration error at most 0.03 while learning, and better than chance by far, after 1,000 tokens."""
    ids = np.load(EXCERPT)["ids"].astype(np.int32)[:, :8]
    forecaster = IdsForecaster([32] * 8, 4)
    said, used, found = [], [], 0
    for number, token in enumerate(ids[:, :, None]):
        forecasts = follow(forecaster, token)
        for layer, chances in forecasts.items() if number >= 1000 else ():
            said.append(chances)
            used.append(np.isin(np.arange(32), token[layer]))
            found += int(np.isin(np.argsort(-chances)[:4], token[layer]).sum())
    chances, truth = np.concatenate(said), np.concatenate(used)
    bins = np.minimum((chances * 20).astype(int), 19)
    error = np.abs(np.bincount(bins, chances - truth, 20)).sum() / len(chances)
    assert error <= 0.03
    assert found / truth.sum() > 0.5
