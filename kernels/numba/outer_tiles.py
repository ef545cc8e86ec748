"""The register tile behind `panels` where the processor has AMX: a panel in bf16 times four times sixteen vectors.

A line of a panel (sixteen rows, 32 columns) is a left operand as it lies there, and a line of packed vectors a right
one. Sums are in fp32, over a panel's columns in ascending order, whatever the number of vectors.
"""

from __future__ import annotations

from moebius.kernels.numba import amx, words
from moebius.kernels.numba.amx import only_with_tiles
from moebius.kernels.numba.bfloats import width_of
from moebius.kernels.numba.outer import LINE, PANEL_ROWS, SUMS, X_LINE
from moebius.kernels.numba.simd import LANES, prefetch
from moebius.kernels.numba.units import word

assert (PANEL_ROWS, LINE) == (amx.ROWS, amx.LINE)
_BLOCKS = 4  # of sixteen vectors at once: a sum's products follow each other after 52 cycles, and begin every 16


@only_with_tiles
def begin_tiles(job):  # type: ignore[no-untyped-def]
    """Make this thread's tiles ready for a job whose panels are multiplied in bf16."""
    if word(job, words.PAIRED) and word(job, words.PACKS):
        amx.configure()
    return True


@only_with_tiles
def end_tiles(job):  # type: ignore[no-untyped-def]
    """This thread needs its tiles no more."""
    if word(job, words.PAIRED) and word(job, words.PACKS):
        amx.release()
    return True


@only_with_tiles
def packs_by_sixteen(vector):  # type: ignore[no-untyped-def]
    """Whether vectors are packed as right operands: 64 bytes hold two columns, interleaved, of sixteen vectors."""
    return width_of(vector) > LANES


@only_with_tiles
def multiply_tiles(panel, pitch, x, x_pitch, lines, blocks, target, fresh, ahead, ask):  # type: ignore[no-untyped-def]
    """Add (`fresh`: write) the products of a panel in bf16 to fp32 [blocks, 16 rows, 16] at `target`.

    Sixteen vectors and the next are `x_pitch` bytes apart; `ahead` is memory to ask for on the way, `ask` cache lines
    with each line of the panel.
    """
    for block in range(0, blocks, _BLOCKS):
        count, y, sums = min(_BLOCKS, blocks - block), x + x_pitch * block, target + SUMS * block
        amx.zero(0)
        amx.zero(1)
        amx.zero(2)
        amx.zero(3)
        if not fresh:
            amx.load(0, sums, LINE)
            if count > 1:
                amx.load(1, sums + SUMS, LINE)
            if count > 2:
                amx.load(2, sums + 2 * SUMS, LINE)
            if count > 3:
                amx.load(3, sums + 3 * SUMS, LINE)
        for line in range(lines):
            if block == 0:
                for index in range(ask * line, ask * (line + 1)):
                    prefetch(ahead + LINE * index)
            z = y + X_LINE * line
            amx.load(4, panel + LINE * line, pitch)
            amx.load(5, z, LINE)
            amx.dot_bf16(0, 4, 5)
            if count > 1:
                amx.load(6, z + x_pitch, LINE)
                amx.dot_bf16(1, 4, 6)
            if count > 2:
                amx.load(7, z + 2 * x_pitch, LINE)
                amx.dot_bf16(2, 4, 7)
            if count > 3:
                amx.load(5, z + 3 * x_pitch, LINE)
                amx.dot_bf16(3, 4, 5)
        amx.store(0, sums, LINE)
        if count > 1:
            amx.store(1, sums + SUMS, LINE)
        if count > 2:
            amx.store(2, sums + 2 * SUMS, LINE)
        if count > 3:
            amx.store(3, sums + 3 * SUMS, LINE)
    return True
