"""Forecasts: what it can learn, that its probabilities mean what they say, and where it says nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.predictors.forecaster import NO_SCORES, Forecaster, Hint

EXCERPT = Path(__file__).parent.parent / "data" / "traces" / "gpt_oss_20b_excerpt.npz"


def follow(forecaster: Forecaster, token: np.ndarray) -> dict[int, np.ndarray]:
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
    forecaster, mapping = Forecaster([8, 8], 1), rng.permutation(8)
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
    forecaster = Forecaster([6] * 4, 1, ahead)
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
    forecaster, previous = Forecaster([6, 6], 1), 0
    for _ in range(1500):
        previous = (previous + 1) % 6
        said = follow(forecaster, np.array([[[rng.integers(6)]], [[previous]]]))
    assert int(said[1].argmax()) == previous
    assert said[1].max() > 0.8


def test_unpredictable_use_gets_its_frequency():
    """Overconfidence: at random routing every probability must stay near k/E."""
    rng = np.random.default_rng(3)
    forecaster = Forecaster([16, 16], 2)
    for _ in range(2000):
        token = np.stack([rng.permutation(16)[:2] for _ in range(2)])[:, None]
        said = follow(forecaster, token)
    assert abs(float(said[1].mean()) - 2 / 16) < 0.05
    assert said[1].max() < 0.5


def test_a_batch_is_foreseen_token_by_token():
    """The chance that any token uses an expert, from tokens that do not mix."""
    rng = np.random.default_rng(4)
    forecaster = Forecaster([8, 8], 1)
    for _ in range(1500):
        first = rng.integers(8, size=(3, 1))
        said = follow(forecaster, np.stack([first, (first + 1) % 8]))
    used = np.unique((first + 1) % 8)
    assert said[1][used].min() > 0.8
    assert np.delete(said[1], used).max() < 0.5


def test_where_nothing_is_foreseen():
    forecaster = Forecaster([4, 4], 1, rows=2)
    forecaster.observe(0, np.zeros((5, 1), np.int32))
    assert forecaster.forecast(0, 5) is None
    assert forecaster.forecast(1) is None
    assert forecaster.forecast(0, 0) is None
    assert forecaster.forecast(0, 1) is not None
    forecaster.observe(1, np.full((1, 1), -1))
    forecaster.observe(1, np.full((1, 1), 4))
    with pytest.raises(ValueError, match="use 1, 2 or 3"):
        Forecaster([4, 4], 1, ahead=4)


def test_probabilities_on_real_routing_are_calibrated():
    """Expected calibration error at most 0.03 while learning, and better than chance by far, after 1,000 tokens."""
    ids = np.load(EXCERPT)["ids"].astype(np.int32)[:, :8]
    forecaster = Forecaster([32] * 8, 4)
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


def hinted(forecaster: Forecaster, layer: int, scores: np.ndarray, k: int) -> None:
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    forecaster.hint(layer, Hint(scores.astype(np.float32), chosen))


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_a_routers_scores_become_probabilities(noise, scale):
    """Scores taken for probabilities: what they are worth depends on the noise, and on nobody's units."""
    rng = np.random.default_rng(5)
    forecaster = Forecaster([16, 16], 3, ids=False)
    said, used = [], []
    for number in range(1500):
        truth = rng.normal(size=(1, 16))
        ids = np.argsort(-truth, axis=1)[:, :3]
        forecaster.observe(0, ids)
        hinted(forecaster, 1, scale * (truth + noise * rng.normal(size=truth.shape)) + 7, 3)
        if number >= 500:
            said.append(forecaster.forecast(0))
            used.append(np.isin(np.arange(16), ids))
        forecaster.observe(1, ids)
    chances, truth = np.concatenate(said), np.concatenate(used)
    bins = np.minimum((chances * 20).astype(int), 19)
    assert np.abs(np.bincount(bins, chances - truth, 20)).sum() / len(chances) <= 0.03
    if noise < 1:
        assert chances[truth].mean() > 0.6
    else:
        assert chances.max() < 0.9


def test_a_router_that_gives_ids_only():
    """A hint without scores that is read as scores of zero."""
    rng = np.random.default_rng(6)
    forecaster = Forecaster([8, 8], 2, ids=False)
    for _ in range(500):
        ids = rng.permutation(8)[None, :2].astype(np.int32)
        forecaster.observe(0, ids)
        forecaster.hint(1, Hint(NO_SCORES, ids))
        said = forecaster.forecast(0)
        forecaster.observe(1, ids)
    assert said is not None
    assert said[ids[0]].min() > 0.8
    assert np.delete(said, ids[0]).max() < 0.1


def test_a_hint_holds_for_one_step():
    """Last token's hint taken for this one's, where the gate has nothing to say any more."""
    forecaster = Forecaster([8, 8], 1, ids=False)
    forecaster.hint(1, Hint(NO_SCORES, np.array([[3]], np.int32)))
    assert forecaster.forecast(0).argmax() == 3
    forecaster.observe(1, np.array([[3]]))
    assert np.ptp(np.delete(forecaster.forecast(0), 3)) == 0
    assert forecaster.forecast(0)[3] < 0.5


def test_scores_that_are_no_numbers_say_nothing():
    """One overflow in a router that turns every later probability into NaN."""
    forecaster = Forecaster([4, 4], 1)
    forecaster.observe(0, np.array([[1]]))
    for bad in (np.nan, np.inf):
        scores = np.zeros((1, 4), np.float32)
        scores[0, 2] = bad
        forecaster.hint(1, Hint(scores, np.array([[2]], np.int32)))
        assert np.isfinite(forecaster.forecast(0)).all()
        forecaster.observe(1, np.array([[2]]))
    assert np.isfinite(forecaster.forecast(0)).all()


steps = st.lists(
    st.tuples(
        st.integers(1, 3),  # tokens
        st.integers(0, 2**16),  # seed of ids and scores
        st.sets(st.integers(0, 5)),  # resident in layer 1
        st.sampled_from([0.0, 0.2, 0.6]),
        st.integers(1, 6),
    ),
    max_size=25,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(steps, st.booleans())
def test_the_record_counts_as_sets_do(history, ids):
    """Recall, precision and calibration against plain Python; `advance` against the calls that it stands for."""
    plain, fused = (Forecaster([6, 6], 2, rows=2, ids=ids) for _ in range(2))
    forecasts = predicted = right = used = offered = offered_right = 0
    gaps = np.zeros((2, 20))
    for tokens, seed, resident, least, limit in history:
        rng = np.random.default_rng(seed)
        first, second = (np.argsort(rng.random((tokens, 6)))[:, :2].astype(np.int32) for _ in range(2))
        hint = Hint(rng.random((tokens, 6)).astype(np.float32), first)
        slots = np.array([7 if e in resident else -1 for e in range(6)], np.int32)
        experts, chances = fused.advance(0, first, hint if tokens <= 2 else None, slots, least, limit)
        plain.observe(0, first)
        if tokens <= 2:
            plain.hint(1, hint)
            rows = []
            for row in range(tokens):  # a token's own probabilities are those of a batch of it alone
                rows.append(1 - (1 - plain.forecast(0, row + 1)) / (1 - plain.forecast(0, row) if row else 1))
            said = plain.forecast(0, tokens)
            order = [e for e in np.argsort(-said, kind="stable") if slots[e] < 0 and said[e] >= least][:limit]
            assert experts.tolist() == order
            np.testing.assert_allclose(chances, said[order], rtol=1e-6)
            offered += len(order)
            offered_right += int(np.isin(order, second).sum())
            for row, mine in zip(rows, second, strict=True):
                forecasts, used = forecasts + 6, used + 2
                predicted += int((row >= 0.5).sum())
                right += int((row[mine] >= 0.5).sum())
                np.add.at(gaps[0], np.minimum((row * 20).astype(int), 19), row)
                np.add.at(gaps[1], np.minimum((row[mine] * 20).astype(int), 19), 1)
        else:
            assert len(experts) == 0
        for forecaster in (plain, fused):
            forecaster.observe(1, second)
    found = fused.accuracy(1)
    assert (found.forecasts, found.used, found.offered) == (forecasts, used, offered)
    assert found.offered_right == offered_right
    assert abs(found.predicted - predicted) <= 1  # rounding at one half
    assert abs(found.predicted_right - right) <= 1
    assert fused.judged().tolist() == [offered_right, offered - offered_right]
    fused.forget_accuracy()
    assert fused.accuracy(1).forecasts == 0
    assert fused.judged().tolist() == [offered_right, offered - offered_right]


def test_what_would_be_written_out_of_bounds_is_refused():
    """Slots behind the last layer, or of another layer, and hints of long steps: memory of others overwritten."""
    forecaster, ids = Forecaster([4, 6], 1, rows=2), np.array([[0]])
    for layer, slots in ((1, 4), (1, 6), (0, 4), (0, 7)):
        with pytest.raises(ValueError, match=rf"slots of {slots} experts were given for layer {layer + 1}.* \[4, 6\]"):
            forecaster.advance(layer, ids, None, np.full(slots, -1, np.int32), 0.0, 1)
    with pytest.raises(ValueError, match="a hint about 3 tokens was given; at most 2"):
        forecaster.advance(0, ids, Hint(NO_SCORES, np.zeros((3, 1), np.int32)), np.full(6, -1, np.int32), 0.0, 1)
    assert forecaster.accuracy(1).forecasts == 0
    assert len(forecaster.advance(1, ids, None, None, 0.0, 1)[0]) == 0


def test_precision_is_that_of_late():
    """A layer that was wrong long ago and stays switched off, or was right and stays on."""
    forecaster = Forecaster([4, 4], 1)
    assert np.isnan(forecaster.precisions()).all()
    for used in [0] * 300 + [1] * 300:
        forecaster.advance(0, np.array([[0]]), None, np.array([-1, 9, 9, 9], np.int32), 0.0, 4)
        forecaster.observe(1, np.array([[used]]))
        if used == 0:
            assert forecaster.precisions()[1] == 1.0
    assert forecaster.precisions()[1] < 0.05
    assert forecaster.accuracy(1).offered_right == 300


def test_an_interruption_is_no_past():
    """Another sequence's last token taken for this one's."""
    forecaster = Forecaster([6, 6], 1)
    for step in range(600):
        follow(forecaster, np.array([[[0]], [[step % 6]]]))
    forecaster.observe(0, np.array([[0]]))
    sure = forecaster.forecast(0)
    forecaster.interrupt()
    forecaster.observe(0, np.array([[0]]))
    assert sure.max() > 0.7
    assert forecaster.forecast(0).max() < 0.5
