"""What a slot table is asked in every step of a layer, on a handful of slots, where each call of numpy would count."""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.jit import entry


@entry("boolean(int32[::1], int32[::1], int64)")
def pin(pins, slots, change):  # type: ignore[no-untyped-def]
    """Add `change` to the pins of `slots`, of which negative ones are none; whether all pins are 0 or more after it."""
    sound = True
    for slot in slots:
        if slot >= 0:
            pins[slot] += change
            sound &= pins[slot] >= 0
    return sound


@entry("Tuple((int32[::1], int64))(int32[::1], int64, int32[::1], int32[::1], boolean[::1])")
def claim(slot_of, first, experts, pins, unproven):  # type: ignore[no-untyped-def]
    """Pin the slots of experts of a layer whose keys begin at `first`.

    Returns:
        The slot of each expert, -1 for none, int32 [A]; how many of them had a mark in `unproven`, which is taken off.
    """
    slots, marked = np.empty(len(experts), np.int32), 0
    for i in range(len(experts)):
        slot = slot_of[first + experts[i]]
        slots[i] = slot
        if slot >= 0:
            pins[slot] += 1
            marked += unproven[slot]
            unproven[slot] = False
    return slots, marked


@entry("boolean(int32[::1], int64, int32[::1])")
def any_there(slot_of, first, experts):  # type: ignore[no-untyped-def]
    """Whether any of the experts of a layer whose keys begin at `first` has a slot."""
    found = False
    for expert in experts:
        found |= slot_of[first + expert] >= 0
    return found
