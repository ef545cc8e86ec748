"""LRU against a plain-Python LRU, and the rules that every policy keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.gpu_cache.policy import LRU, POLICIES, Reason, make_policy
from moebius.gpu_cache.slots import SlotTable, State


def some(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def load(table: SlotTable, layer: int, experts: np.ndarray, slots: np.ndarray) -> None:
    table.reserve(layer, slots[slots >= 0], experts[slots >= 0])
    table.publish(slots[slots >= 0])


def step(policy, table: SlotTable, layer: int, experts: np.ndarray) -> int:
    """One layer step that admits its misses at once; returns the number of hits."""
    hit = table.lookup(layer, experts) >= 0
    policy.used(layer, experts, hit)
    missed = experts[~hit]
    load(table, layer, missed, policy.place(table, layer, missed, Reason.ADMIT))
    return int(hit.sum())


def resident(table: SlotTable, layer: int, count: int) -> set[int]:
    return set(np.flatnonzero(table.lookup(layer, np.arange(count)) >= 0).tolist())


@settings(derandomize=True, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), max_size=60),
    share=st.integers(3, 6),
)
def test_lru_keeps_what_a_plain_lru_keeps(steps, share):
    """Any error in recency order. Events are atomic: ties are resolved only where the outcome is the same."""
    policy, table = LRU([10, 10]), SlotTable([10, 10], 2 * share)
    last: dict[int, int] = {}
    kept: set[int] = set()
    for now, experts in enumerate(steps):
        hits = step(policy, table, 1, np.sort(some(*experts)))
        assert hits == len(kept & set(experts))
        last |= dict.fromkeys(experts, now)
        got = resident(table, 1, 10)
        assert got <= set(last)
        assert set(experts) <= got
        assert len(got) == min(share, len(last))
        oldest_kept = min(last[expert] for expert in got)
        assert all(last[expert] <= oldest_kept for expert in set(last) - got if expert in kept)
        kept = got
    assert resident(table, 0, 10) == set()


def test_an_event_larger_than_the_cache_does_not_displace_itself():
    """Uploads that replace one another within one step."""
    policy, table = LRU([8]), SlotTable([8], 2)
    step(policy, table, 0, some(0, 1))
    policy.used(0, some(0, 1, 2, 3), np.array([True, True, False, False]))
    assert policy.place(table, 0, some(2, 3), Reason.ADMIT).tolist() == [-1, -1]


def test_demand_displaces_even_recent_experts_but_not_pinned_ones():
    policy, table = LRU([8]), SlotTable([8], 2)
    step(policy, table, 0, some(0, 1))
    table.pin(table.lookup(0, some(0)))
    assert policy.place(table, 0, some(5, 6), Reason.DEMAND).tolist() == [int(table.lookup(0, some(1))[0]), -1]


def test_a_prefetch_leaves_the_last_step_and_earlier_prefetches_alone():
    """Two predictions that displace each other, or the experts just used."""
    policy, table = LRU([8]), SlotTable([8], 3)
    step(policy, table, 0, some(0, 1))
    step(policy, table, 0, some(1, 2))
    first = policy.place(table, 0, some(5), Reason.PREFETCH)
    assert first.tolist() == table.lookup(0, some(0)).tolist()
    load(table, 0, some(5), first)
    assert policy.place(table, 0, some(6), Reason.PREFETCH).tolist() == [-1]


def test_knowledge_survives_a_new_table():
    """After a change of the budget, recency starts from nothing."""
    policy, table = LRU([8]), SlotTable([8], 4)
    step(policy, table, 0, some(0, 1))
    step(policy, table, 0, some(2))
    smaller = SlotTable([8], 2)
    load(smaller, 0, some(2, 0), some(0, 1))
    policy.used(0, some(7), np.array([False]))
    assert policy.place(smaller, 0, some(7), Reason.ADMIT).tolist() == [1]


@pytest.mark.parametrize("name", POLICIES)
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_every_policy_keeps_the_rules(name, data):
    """A slot that is loading, pinned, chosen twice, or out of range."""
    experts, slots = [5, 1, 9], data.draw(st.integers(1, 12))
    policy, table = make_policy(name, experts), SlotTable(experts, slots)
    for _ in range(12):
        layer = data.draw(st.integers(0, 2))
        wanted = some(*data.draw(st.sets(st.integers(0, experts[layer] - 1), min_size=1)))
        policy.used(layer, wanted, table.lookup(layer, wanted) >= 0)
        missed = wanted[table.occupied(layer, wanted) < 0]
        takeable = table.takeable()
        chosen = policy.place(table, layer, missed, data.draw(st.sampled_from(Reason)))
        assert chosen.shape == missed.shape
        assert chosen.dtype == np.int32
        taken = chosen[chosen >= 0]
        assert takeable[taken].all()
        assert len(set(taken.tolist())) == len(taken)
        table.reserve(layer, taken, missed[chosen >= 0])
        for slot in np.flatnonzero(table.state == State.LOADING):
            if data.draw(st.booleans()):
                table.publish(some(slot))
        table.pins[:] = data.draw(st.lists(st.integers(0, 1), min_size=slots, max_size=slots))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'fifo' is unknown; choose one of .*lru"):
        make_policy("fifo", [4])
