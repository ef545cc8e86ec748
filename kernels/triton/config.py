"""How kernels are launched."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from moebius.kernels.formats import CODES, FLOATS

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides when it decorates a kernel

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # fused multiply-add, said here because Triton's default changes


class DecodeTile(NamedTuple):
    """Weights that a program of `decode` reads in one step."""

    rows: int
    columns: int  # whole groups
    warps: int


class PrefillTile(NamedTuple):
    """What a program of `prefill` computes, and how far it goes in one step."""

    pairs: int
    columns: int  # of the product
    depth_bytes: int  # of the operands; whole groups in every type
    warps: int


# 8 KiB of bf16 and 4 KiB of codes a step, and a cache line of depth. Not yet tuned on a device (`benchmarks/gpu.py`
# tries others). The interpreter costs about 15 ms per program whatever its size, so tiles are large there.
_LARGE, _SMALL = DecodeTile(256, 256, 4), DecodeTile(16, 256, 4)
_KINDS = (*FLOATS, *CODES)  # see `RecordLayout.code`
DECODE_TILES: dict[str, DecodeTile] = dict.fromkeys(_KINDS, _LARGE if INTERPRETED else _SMALL)
if not INTERPRETED:
    DECODE_TILES |= dict.fromkeys(("int4", "e2m1"), DecodeTile(16, 512, 4))
_WIDE, _SQUARE = PrefillTile(128, 256, 1024, 4), PrefillTile(64, 64, 128, 4)
PREFILL_TILES: dict[str, PrefillTile] = dict.fromkeys(_KINDS, _WIDE if INTERPRETED else _SQUARE)
