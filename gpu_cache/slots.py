"""Which expert of which layer is in which slot of one pool, and what may happen to the slot next."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from moebius.kernels.numba import slots as compiled


class State(IntEnum):
    """Life of a slot: free -> loading (a copy is under way) -> ready (visible to lookups) -> free."""

    FREE = 0
    LOADING = 1
    READY = 2


_FREE, _LOADING, _READY = map(int, State)  # Python 3.11 takes 0.3 us to find a member of an enumeration


class SlotTable:
    """A bijection between the occupied slots of a pool and the experts in them.

    All experts of the pool's layers are numbered through: expert e of layer l has key ``base[l] + e``, so that policies
    can hold one flat array of values per pool. Transitions are checked; no method copies bytes.

    Args:
        experts: number of experts E of each layer of the pool.
        slots: number of slots S.
    """

    def __init__(self, experts: Sequence[int], slots: int) -> None:
        self.base: np.ndarray = np.concatenate([[0], np.cumsum(experts)]).astype(np.int64)  # [L + 1]
        self._first: list[int] = self.base.tolist()
        total = self._first[-1]
        self.slot_of: np.ndarray = np.full(total, -1, np.int32)  # of each key, loading or ready
        self.visible: np.ndarray = np.full(total, -1, np.int32)  # of each key, ready only
        self.key_of: np.ndarray = np.full(slots, -1, np.int64)  # of each slot
        self.state: np.ndarray = np.full(slots, _FREE, np.uint8)
        self.pins: np.ndarray = np.zeros(slots, np.int32)

    @property
    def slots(self) -> int:
        return len(self.key_of)

    @property
    def layers(self) -> int:
        return len(self.base) - 1

    def first(self, layer: int) -> int:
        """Key of a layer's expert 0; of the layer behind the last one, the number of keys."""
        return self._first[layer]

    def keys(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Keys of `experts` (integer [n]) of a layer, int64 [n]."""
        return self.base[layer] + experts

    def lookup(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Ready slot of each expert or -1, int32 [n]."""
        return self.visible[self._first[layer] + experts]

    def occupied(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Slot of each expert, ready or loading, or -1, int32 [n]."""
        return self.slot_of[self._first[layer] + experts]

    def any_there(self, layer: int, experts: np.ndarray) -> bool:
        """Whether any of the experts (int32 [n]) has a slot, ready or loading."""
        return compiled.any_there(self.slot_of, self._first[layer], experts)

    def takeable(self) -> np.ndarray:
        """Slots that may be overwritten, bool [S]: free ones, and ready ones that nobody has pinned."""
        return (self.state != _LOADING) & (self.pins == 0)

    def layer_of(self, key: int) -> int:
        """The layer of an expert's key."""
        return int(np.searchsorted(self.base, key, side="right")) - 1

    def layer_and_expert(self, slot: int) -> tuple[int, int]:
        """What occupies a slot."""
        key = int(self.key_of[slot])
        assert key >= 0, f"slot {slot} is free"
        layer = self.layer_of(key)
        return layer, key - int(self.base[layer])

    def reserve(self, slot: int, layer: int, expert: int) -> None:
        """Give a takeable slot to an expert that is in no slot; the former occupant is invisible from here on."""
        key = self._first[layer] + expert
        assert self.state[slot] != _LOADING, f"slot {slot} is loading"
        assert self.pins[slot] == 0, f"slot {slot} is pinned"
        assert self.slot_of[key] < 0, f"expert {expert} of layer {layer} has slot {self.slot_of[key]} already"
        self.release(slot)
        self.slot_of[key], self.key_of[slot], self.state[slot] = slot, key, _LOADING

    def publish(self, slot: int) -> None:
        """Make a loaded slot visible: its copy has completed."""
        assert self.state[slot] == _LOADING, f"slot {slot} is not loading"
        self.state[slot] = _READY
        self.visible[self.key_of[slot]] = slot

    def release(self, slot: int) -> None:
        """Make a slot free, whatever it held."""
        key = self.key_of[slot]
        if key >= 0:
            self.slot_of[key] = self.visible[key] = -1
        self.key_of[slot], self.state[slot] = -1, _FREE

    def clear(self) -> None:
        """Make all slots free and nobody's, whatever the table says."""
        for array in (self.slot_of, self.visible, self.key_of):
            array.fill(-1)
        self.state.fill(_FREE)
        self.pins.fill(0)

    def claim(
        self, layer: int, experts: np.ndarray, unproven: np.ndarray, loading: bool = False
    ) -> tuple[np.ndarray, int]:
        """As `lookup`, or where `loading` is set as `occupied`, with a `pin` of the slots found.

        Args:
            unproven: bool [S]; of the slots found, marks are taken off.

        Returns:
            The slots, int32 [n], and how many of them had a mark.
        """
        slots, marked = compiled.claim(
            self.slot_of if loading else self.visible, self._first[layer], experts, self.pins, unproven
        )
        return slots, marked

    def pin(self, slots: np.ndarray) -> None:
        """Protect distinct slots (int32 [n], -1 for none) from being overwritten until `unpin`; pins nest."""
        compiled.pin(self.pins, slots, 1)

    def unpin(self, slots: np.ndarray) -> None:
        """Take back one `pin` of these slots."""
        sound = compiled.pin(self.pins, slots, -1)
        assert sound, "a slot was unpinned more often than pinned"


def divide(slots: int, experts: Sequence[int]) -> np.ndarray:
    """Divide a pool's slots evenly between its layers, int64 [L]; no layer gets more than it has experts.

    The remainder goes to the first layers that have room.
    """
    room = np.asarray(experts, np.int64)
    shares = np.zeros(len(room), np.int64)
    slots = min(slots, int(room.sum()))
    while slots:
        hungry = np.flatnonzero(shares < room)
        each = slots // len(hungry)
        extra = np.minimum(each, (room - shares)[hungry]) if each else np.arange(len(hungry)) < slots
        shares[hungry] += extra
        slots -= int(extra.sum())
    return shares
