"""Which expert of which layer is in which slot of one pool, and what may happen to the slot next."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from moebius.kernels.numba import slots as compiled
from moebius.kernels.numba.bundle import bundle


class State(IntEnum):
    """Life of a slot: free -> loading (a copy is under way) -> ready (visible to lookups) -> free."""

    FREE = compiled.FREE
    LOADING = compiled.LOADING
    READY = compiled.READY


class SlotTable:
    """A bijection between the occupied slots of a pool and the experts in them.

    All experts of the pool's layers are numbered through: expert e of layer l has key ``base[l] + e``, so that policies
    can hold one flat array of values per pool. Transitions are checked; no method copies bytes. Slots and experts are
    given as int32 [n], each once, and experts as numbers in their layer.

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
        self.state: np.ndarray = np.full(slots, compiled.FREE, np.uint8)
        self.pins: np.ndarray = np.zeros(slots, np.int32)
        self.marks: np.ndarray = np.zeros(slots, np.bool_)  # set by the owner, taken off by whoever finds the slot
        self.left: np.ndarray = np.zeros(slots, np.int64)  # `now` when each slot was last unpinned
        self.now = 0  # a count that the owner raises
        arrays = self.slot_of, self.visible, self.key_of, self.state, self.pins, self.marks, self.left
        self._words = bundle(arrays, compiled.KINDS)

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
        """Whether any of the experts has a slot, ready or loading."""
        return compiled.any_there(self._words, self._first[layer], experts)

    def takeable(self) -> np.ndarray:
        """Slots that may be overwritten, bool [S]: free ones, and ready ones that nobody has pinned."""
        return (self.state != compiled.LOADING) & (self.pins == 0)

    def layer_of(self, key: int) -> int:
        """The layer of an expert's key."""
        return int(np.searchsorted(self.base, key, side="right")) - 1

    def reserve(self, layer: int, slots: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """Give takeable slots to experts in no slot; the former occupants are invisible from here on.

        Returns:
            Keys of those of them that had a mark, int64 [m].
        """
        lost = compiled.reserve(self._words, self._first[layer], slots, experts)
        sound = not len(lost) or lost[0] >= 0
        assert sound, f"of slots {slots} for experts {experts}, one is loading, pinned, or another's already"
        return lost

    def publish(self, slots: np.ndarray) -> None:
        """Make loaded slots visible: their copies have completed."""
        loading = compiled.publish(self._words, slots)
        assert loading, f"of slots {slots}, one was not loading"

    def release(self, slots: np.ndarray) -> None:
        """Make slots free, whatever they held."""
        compiled.release(self._words, slots)

    def clear(self) -> None:
        """Make all slots free and nobody's, whatever the table says."""
        for array in (self.slot_of, self.visible, self.key_of):
            array.fill(-1)
        self.state.fill(compiled.FREE)
        self.pins.fill(0)
        self.marks.fill(False)
        self.left.fill(0)

    def claim(self, layer: int, experts: np.ndarray, loading: bool = False) -> tuple[np.ndarray, int]:
        """As `lookup`, or where `loading` is set as `occupied`, with a `pin` of the slots found.

        Returns:
            The slots, int32 [n], and how many of them had a mark, which is taken off.
        """
        slots, marked = compiled.claim(self._words, self._first[layer], experts, loading)
        return slots, marked

    def pin(self, slots: np.ndarray) -> None:
        """Protect slots (-1 for none) from being overwritten until `unpin`; pins nest."""
        compiled.pin(self._words, slots)

    def unpin(self, slots: np.ndarray) -> None:
        """Take back one `pin` of these slots."""
        sound = compiled.unpin(self._words, slots, self.now)
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
