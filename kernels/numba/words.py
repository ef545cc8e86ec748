"""The words (int64) of a layer's description and of a job, as Python writes them and kernels read them.

A layer is described once; a job is one call for one layer, worked on by several threads at once.
"""

from __future__ import annotations

WORD = 8  # bytes

# Layer: sizes, the activation, then address and stride (bytes from expert to expert) of each part; 0: no such part.
HIDDEN, INTERMEDIATE, KIND = 0, 1, 2
ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT = 3, 4, 5, 6, 7  # fp32 bits in the low half
GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = 8, 10, 12, 14, 16, 18
LAYER_WORDS = 20

# Job: two counters on cache lines of their own, then addresses.
NEXT = 0  # next unit of work that nobody has taken
DONE = 8  # finished units of the first phase
LAYER, X, OUT, INNER, STRIDE = 16, 17, 18, 19, 20  # INNER: fp32 [P, STRIDE], the activated intermediate
ACTIVE, EXPERTS, OFFSETS, TOKENS, WEIGHTS = 21, 22, 23, 24, 25
JOB_WORDS = 32
