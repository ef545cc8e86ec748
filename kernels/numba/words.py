"""The words (int64) of a layer's description and of a job, as Python writes them and kernels read them.

A layer is described once; a job is one call for one layer, worked on by several threads at once.
"""

from __future__ import annotations

WORD = 8  # bytes

# Layer: sizes, the activation, then for each part where in a table the address for expert 0 is; 0: no such part. The
# table has a row of addresses for each expert, so that parts may lie anywhere, and an expert's are on one cache line.
HIDDEN, INTERMEDIATE, KIND = 0, 1, 2
ALPHA, GATE_MAX, ACT_MAX, UP_MAX, UP_SHIFT = 3, 4, 5, 6, 7  # fp32 bits in the low half
GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = 8, 9, 10, 11, 12, 13
GATE_SCALE, UP_SCALE, DOWN_SCALE = 14, 15, 16
GATE_ZERO, UP_ZERO, DOWN_ZERO = 17, 18, 19
SCALE_KIND, SCALE_ROWS, SCALE_COLUMNS = 20, 21, 22  # see `decoding`; the block that shares a scale, 0: all
LAYER_WORDS = 23
PARTS = SCALE_KIND - GATE  # words of a row of the table

# Job: two counters on cache lines of their own, then sizes and addresses.
NEXT = 0  # next unit of work that nobody has taken
DONE = 8  # finished units of the first two phases
LAYER, ACTIVE, EXPERTS, OFFSETS, TOKENS, WEIGHTS, OUT = 16, 17, 18, 19, 20, 21, 22
FEW = 23  # an expert with more pairs is computed in panels
PREPARES = 24  # tokens whose input has to be brought from SOURCE to X
PACKS = 25  # units that pack inputs: one for each active expert if any has many pairs
SOURCE, SOURCE_KIND = 26, 27  # kind 0: fp32, 1: bf16, 2: fp16
X, X_BYTES = 28, 29  # inputs as the kernels read them, bytes from token to token; the caller's own if need be
INNER, INNER_BYTES = 30, 31  # activated intermediates, bytes from slot to slot
PACKED, PACKED_BYTES = 32, 33  # packed inputs, bytes from slot to slot
PAIRED = 34  # whether panels are multiplied in bf16 (1) or fp32 (0)
JOB_WORDS = 40
