"""What a table of slots is asked and told in every step of a layer: a call of numpy each would count there.

The table is a bundle of arrays, made by `moebius.gpu_cache.slots`, in the order of `KINDS`.
"""

from __future__ import annotations

import numpy as np

from moebius.kernels.numba.bundle import BUNDLE, open1
from moebius.kernels.numba.jit import entry, helper

FREE, LOADING, READY = range(3)
# Slot of each key, ready or loading, and ready only; of each slot its key, state, pins, mark, and when it was left.
SLOT_OF, VISIBLE, KEY_OF, STATE, PINS, MARKS, LEFT = range(7)
KINDS = (
    (np.int32, 1), (np.int32, 1),
    (np.int64, 1), (np.uint8, 1), (np.int32, 1), (np.bool_, 1), (np.int64, 1),
)  # fmt: skip


@helper
def opened(words):  # type: ignore[no-untyped-def]
    """The arrays of a table, a tuple."""
    i32, i64 = np.int32(0), np.int64(0)
    return (
        open1(words, 0, i32), open1(words, 1, i32),
        open1(words, 2, i64), open1(words, 3, np.uint8(0)), open1(words, 4, i32),
        open1(words, 5, np.bool_(False)), open1(words, 6, i64),
    )  # fmt: skip


@helper
def _release(table, slot):  # type: ignore[no-untyped-def]
    key = table[KEY_OF][slot]
    if key >= 0:
        table[SLOT_OF][key] = table[VISIBLE][key] = -1
    table[KEY_OF][slot], table[STATE][slot] = -1, FREE


@entry(f"int64[::1]({BUNDLE}, int64, int32[::1], int32[::1])")
def reserve(words, first, slots, experts):  # type: ignore[no-untyped-def]
    """Give slots to experts of a layer whose keys begin at `first`.

    Returns:
        Keys of the former occupants that had a mark, which is taken off; an only -1 where a slot or an expert was not
        to be had.
    """
    table = opened(words)
    slot_of, key_of, state, pins, marks = table[SLOT_OF], table[KEY_OF], table[STATE], table[PINS], table[MARKS]
    lost, count = np.empty(len(slots), np.int64), 0
    for i in range(len(slots)):
        slot, key = slots[i], first + experts[i]
        if state[slot] == LOADING or pins[slot] != 0 or slot_of[key] >= 0:
            return np.full(1, np.int64(-1))
        if marks[slot]:
            lost[count] = key_of[slot]
            count += 1
            marks[slot] = False
        _release(table, slot)
        slot_of[key], key_of[slot], state[slot] = slot, key, LOADING
    return lost[:count]


@entry(f"boolean({BUNDLE}, int32[::1])")
def publish(words, slots):  # type: ignore[no-untyped-def]
    """Make loaded slots visible; whether all were loading."""
    table, sound = opened(words), True
    visible, key_of, state = table[VISIBLE], table[KEY_OF], table[STATE]
    for slot in slots:
        sound &= state[slot] == LOADING
        state[slot] = READY
        visible[key_of[slot]] = slot
    return sound


@entry(f"void({BUNDLE}, int32[::1])")
def release(words, slots):  # type: ignore[no-untyped-def]
    """Make slots free, whatever they held."""
    table = opened(words)
    for slot in slots:
        _release(table, slot)


@entry(f"Tuple((int32[::1], int64))({BUNDLE}, int64, int32[::1], boolean)")
def claim(words, first, experts, loading):  # type: ignore[no-untyped-def]
    """Pin the slots in which experts of a layer, whose keys begin at `first`, are ready, or also `loading`.

    Returns:
        The slot of each expert, -1 for none, int32 [A]; how many of them had a mark, which is taken off.
    """
    table = opened(words)
    where = table[SLOT_OF] if loading else table[VISIBLE]
    pins, marks = table[PINS], table[MARKS]
    slots, marked = np.empty(len(experts), np.int32), 0
    for i in range(len(experts)):
        slot = slots[i] = where[first + experts[i]]
        if slot >= 0:
            pins[slot] += 1
            marked += marks[slot]
            marks[slot] = False
    return slots, marked


@entry(f"void({BUNDLE}, int32[::1])")
def pin(words, slots):  # type: ignore[no-untyped-def]
    """Pin `slots`, of which negative ones are none."""
    pins = opened(words)[PINS]
    for slot in slots:
        if slot >= 0:
            pins[slot] += 1


@entry(f"boolean({BUNDLE}, int32[::1], int64)")
def unpin(words, slots, now):  # type: ignore[no-untyped-def]
    """Take one pin off `slots`, which are left `now`; whether all had one."""
    table, sound = opened(words), True
    pins, left = table[PINS], table[LEFT]
    for slot in slots:
        if slot >= 0:
            pins[slot] -= 1
            left[slot] = now
            sound &= pins[slot] >= 0
    return sound


@entry(f"boolean({BUNDLE}, int64, int32[::1])")
def any_there(words, first, experts):  # type: ignore[no-untyped-def]
    """Whether any of the experts of a layer whose keys begin at `first` has a slot."""
    slot_of, found = opened(words)[SLOT_OF], False
    for expert in experts:
        found |= slot_of[first + expert] >= 0
    return found


@entry("int32[::1](int64, int32[::1], int32[::1])")
def scatter(count, places, slots):  # type: ignore[no-untyped-def]
    """int32 [count] with `slots` at `places`, and -1 elsewhere."""
    found = np.full(count, np.int32(-1))
    for i in range(len(places)):
        found[places[i]] = slots[i]
    return found
