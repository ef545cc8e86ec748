"""Whether foreseeing pays, decided from costs and outcomes."""

from __future__ import annotations

import pytest

from moebius.predictors.switch import BURST, FIRST, LEARNING, PERIOD, TRYING, Switch, least_chance


def pass_tokens(switch: Switch, tokens: int, **world: float) -> int:
    """Tokens foreseen of so many in a world where each foreseen token has `right` and `wrong` offers."""
    looked = since = before = judged = 0
    for token in range(1, tokens + 1):
        looking = switch.begin_token()
        if switch.due:
            count = since - before
            switch.judge(
                round(world.get("missed", 4) * (token - judged)),
                round(count * world.get("right", 0)),
                round(count * world.get("wrong", 0)),
                world.get("price", 1.0),
                world.get("miss_us", 100.0),
                world.get("cost_us", 50.0),
                bool(world.get("in_time", True)),
            )
            before, judged = since, token
        since += looking
        looked += looking
    return looked


def test_threshold_balances_a_saved_miss_and_a_wasted_upload() -> None:
    """Catches a threshold of the wrong ratio: p saved misses against (1 - p) uploads that nobody needed."""
    for price in (0.0, 0.25, 1.0, 3.0):
        p = least_chance(price)
        assert p == pytest.approx((1 - p) * price)


def test_what_pays_stays_awake() -> None:
    """Catches a switch that rests without a reason."""
    switch = Switch()
    assert pass_tokens(switch, 2000, right=2, wrong=0.5) == 2000
    assert switch.reason is None


def test_what_cannot_pay_is_hardly_tried() -> None:
    """Catches a predictor that costs more than all misses together and runs on."""
    switch = Switch()
    looked = pass_tokens(switch, 16 * TRYING, missed=0.3, right=0.3, cost_us=50.0, miss_us=100.0)
    assert looked <= FIRST + 16 * BURST
    assert switch.reason is not None
    assert "all misses" in switch.reason


def test_nothing_is_copied_before_it_is_seen_to_pay() -> None:
    """Catches copies on trust, and a first judgement that comes late."""
    switch = Switch()
    assert not switch.awake
    pass_tokens(switch, FIRST, right=2)
    assert switch.awake


def test_what_does_not_pay_is_tried_less_and_less_and_wakes() -> None:
    """Catches wrong offers that are not counted, trying that costs as much as working, and a rest that never ends."""
    switch = Switch()
    learning = pass_tokens(switch, 2 * PERIOD, right=1, wrong=1)
    assert BURST * 2 * PERIOD // TRYING <= learning < FIRST + BURST * (2 * PERIOD // TRYING + 1)
    pass_tokens(switch, 8 * PERIOD, right=1, wrong=1)
    assert switch.learned >= LEARNING
    assert pass_tokens(switch, 4 * PERIOD, right=1, wrong=1) == 4 * BURST
    assert not switch.awake
    assert "prefetching saves" in (switch.reason or "")
    pass_tokens(switch, 20 * PERIOD, right=2, wrong=0.1)
    assert switch.awake
    assert switch.reason is None


def test_copies_that_come_too_late_put_it_to_rest() -> None:
    """Catches prefetches over a link that is slower than the layers."""
    switch = Switch()
    pass_tokens(switch, 2 * PERIOD, right=2, in_time=False)
    assert "arrives in time" in (switch.reason or "")
    pass_tokens(switch, 2 * PERIOD, right=2)
    assert switch.awake
