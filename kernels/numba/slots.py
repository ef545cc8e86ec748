"""What a slot table is asked in every step of a layer, on a handful of slots, where each call of numpy would count."""

from __future__ import annotations

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


@entry("int64(boolean[::1], int32[::1])")
def prove(unproven, slots):  # type: ignore[no-untyped-def]
    """Take the marks off `slots`, of which negative ones are none; how many there were."""
    marked = 0
    for slot in slots:
        if slot >= 0 and unproven[slot]:
            unproven[slot] = False
            marked += 1
    return marked


@entry("boolean(int32[::1], int64, int32[::1], int32[::1])")
def holds(slot_of, first, experts, slots):  # type: ignore[no-untyped-def]
    """Whether each expert, of a layer whose keys begin at `first`, is in its entry of `slots`."""
    held = True
    for i in range(len(experts)):
        held &= slot_of[first + experts[i]] == slots[i]
    return held
