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
    table.reserve(1, 1, 4)
    assert table.lookup(1, some(4)).tolist() == [-1]
    assert table.occupied(1, some(4)).tolist() == [1]
    table.publish(1)
    assert table.lookup(1, some(3, 4)).tolist() == [-1, 1]
    table.reserve(1, 0, 2)
    assert table.lookup(1, some(4)).tolist() == [-1]
    assert table.layer_and_expert(1) == (0, 2)


def test_same_expert_number_in_two_layers_is_two_experts():
    table = SlotTable(EXPERTS, 2)
    table.reserve(0, 0, 1)
    table.publish(0)
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
            self.table.reserve(slot, layer, expert)
            self.content[slot] = (layer, expert, False)

    @precondition(lambda self: any(not ready for *_, ready in self.content.values()))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([slot for slot, (*_, ready) in self.content.items() if not ready]))
        self.table.publish(slot)
        self.content[slot] = (*self.content[slot][:2], True)

    @rule(slot=st.integers(0, 3))
    def release(self, slot: int) -> None:
        self.table.release(slot)
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
