"""The slot table and the division of slots between layers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moebius.gpu_cache.slots import SlotTable, State, divide

EXPERTS = (3, 5, 2)


def some(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def test_visible_only_between_publish_and_the_next_reserve():
    """A slot that lookups see while its bytes are incomplete or already leaving."""
    table = SlotTable(EXPERTS, 2)
    table.reserve(1, some(1), some(4))
    assert table.lookup(1, some(4)).tolist() == [-1]
    assert table.occupied(1, some(4)).tolist() == [1]
    table.publish(some(1))
    assert table.lookup(1, some(3, 4)).tolist() == [-1, 1]
    table.reserve(0, some(1), some(2))
    assert table.lookup(1, some(4)).tolist() == [-1]
    assert table.occupied(0, some(2)).tolist() == [1]


def test_same_expert_number_in_two_layers_is_two_experts():
    table = SlotTable(EXPERTS, 2)
    table.reserve(0, some(0), some(1))
    table.publish(some(0))
    assert table.lookup(1, some(1)).tolist() == [-1]


def test_pins_nest():
    """One `unpin` that frees a slot which two steps use."""
    table = SlotTable(EXPERTS, 2)
    table.pin(some(0))
    table.pin(some(0, 1))
    table.unpin(some(0, 1))
    assert table.takeable().tolist() == [False, True]
    with pytest.raises(AssertionError, match="unpinned more often"):
        table.unpin(some(1))


def test_no_transition_that_would_lose_an_expert():
    """A slot given away while it is loading, in use, or for an expert that has one; a copy that ends twice."""
    table = SlotTable(EXPERTS, 3)
    assert len(table.reserve(0, some(0), some(0))) == 0
    for slots, experts in ((some(0), some(1)), (some(1), some(0)), (some(2, 2), some(1, 2))):
        with pytest.raises(AssertionError, match="one is loading, pinned, or another's already"):
            table.reserve(0, slots, experts)
    table.publish(some(0))
    with pytest.raises(AssertionError, match="one was not loading"):
        table.publish(some(0))
    table.pin(some(0))
    with pytest.raises(AssertionError, match="pinned"):
        table.reserve(0, some(0), some(1))


def test_marks_are_taken_off_once():
    """A prefetch counted as used twice, as used and wasted, or not at all."""
    table = SlotTable(EXPERTS, 3)
    table.reserve(1, some(0, 1), some(2, 3))
    table.marks[[0, 1]] = True
    assert table.claim(1, some(2, 3))[1] == 0
    assert table.claim(1, some(2), loading=True)[1] == 1
    assert table.claim(1, some(2), loading=True)[1] == 0
    table.publish(some(0, 1))
    table.unpin(some(0, 0))
    assert table.reserve(0, some(0, 1), some(0, 1)).tolist() == [3 + 3]


def test_a_slot_knows_when_it_was_left():
    """A copy that does not wait for the launch which still reads its slot."""
    table = SlotTable(EXPERTS, 3)
    for now, slots in ((1, some(0, 1)), (2, some(1, -1))):
        table.pin(slots)
        table.now = now
        table.unpin(slots)
    assert table.left.tolist() == [1, 2, 0]


class Table(RuleBasedStateMachine):
    """The table against a dict of what is where."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(EXPERTS, 4)
        self.content: dict[int, tuple[int, int, bool]] = {}

    @rule(slot=st.integers(0, 3), layer=st.integers(0, 2), expert=st.integers(0, 4))
    def reserve(self, slot: int, layer: int, expert: int) -> None:
        elsewhere = (layer, expert) in [content[:2] for content in self.content.values()]
        if expert < EXPERTS[layer] and not elsewhere and self.table.takeable()[slot]:
            self.table.reserve(layer, some(slot), some(expert))
            self.content[slot] = (layer, expert, False)

    @precondition(lambda self: any(not ready for *_, ready in self.content.values()))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([slot for slot, (*_, ready) in self.content.items() if not ready]))
        self.table.publish(some(slot))
        self.content[slot] = (*self.content[slot][:2], True)

    @rule(slot=st.integers(0, 3))
    def release(self, slot: int) -> None:
        self.table.release(some(slot))
        self.content.pop(slot, None)

    @invariant()
    def table_and_model_agree(self) -> None:
        for layer, count in enumerate(EXPERTS):
            for expert in range(count):
                slots = [slot for slot, content in self.content.items() if content[:2] == (layer, expert)]
                visible = [slot for slot in slots if self.content[slot][2]]
                assert self.table.occupied(layer, some(expert)).tolist() == (slots or [-1])
                assert self.table.lookup(layer, some(expert)).tolist() == (visible or [-1])
        assert (self.table.state == State.FREE).sum() == 4 - len(self.content)


TestTable = Table.TestCase
TestTable.settings = settings(derandomize=True, deadline=None, max_examples=50)


@settings(derandomize=True, deadline=None)
@given(slots=st.integers(0, 60), experts=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_division_is_complete_and_even(slots, experts):
    """Slots that no layer may use, or that exceed a layer's experts."""
    shares = divide(slots, experts)
    assert shares.sum() == min(slots, sum(experts))
    assert (shares <= experts).all()
    hungry = shares < experts
    if hungry.any():
        assert shares.max() - shares[hungry].min() <= 1
    assert divide(7, [9, 9, 9]).tolist() == [3, 2, 2]


def test_slots_and_policies_do_not_need_torch():
    """Replay runs policies where torch is not loaded."""
    code = "import sys; sys.modules['torch'] = None; import moebius.gpu_cache.slots, moebius.gpu_cache.policy"
    subprocess.run([sys.executable, "-c", code], check=True)
