"""How kernels are launched: the tiles that are built in, and others worth trying on a device."""

from __future__ import annotations

import os
from itertools import product
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


# Largest numbers of tokens of each class, which has tiles of its own. `decode` has one class: the order of its sums
# must not depend on how many tokens there are. From 17 on an expert often has more than a pair or two; before, a tile
# of `prefill` would be mostly padding.
DECODE_TOKENS = 16
TOKEN_CLASSES: dict[str, int | None] = {"decode": DECODE_TOKENS, "batch": 256, "prompt": None}

# 8 KiB of bf16 and 4 KiB of codes a step, and a cache line of depth: what runs where nothing was tuned (`tuning.py`).
# The interpreter costs about 15 ms per program whatever its size, so tiles are large there.
_LARGE, _SMALL = DecodeTile(256, 256, 4), DecodeTile(16, 256, 4)
_KINDS = (*FLOATS, *CODES)  # see `RecordLayout.code`
DECODE_TILES: dict[str, DecodeTile] = dict.fromkeys(_KINDS, _LARGE if INTERPRETED else _SMALL)
if not INTERPRETED:
    DECODE_TILES |= dict.fromkeys(("int4", "e2m1"), DecodeTile(16, 512, 4))
_WIDE, _SQUARE = PrefillTile(128, 256, 1024, 4), PrefillTile(64, 64, 128, 4)
PREFILL_TILES: dict[str, PrefillTile] = dict.fromkeys(_KINDS, _WIDE if INTERPRETED else _SQUARE)


def token_class(tokens: int) -> str:
    """The class of so many tokens."""
    return next(name for name, most in TOKEN_CLASSES.items() if most is None or tokens <= most)


def built_in(code: str, tokens: str) -> DecodeTile | PrefillTile:
    """The tile of records with this `RecordLayout.code` and a class of tokens, where nothing was tuned."""
    return DECODE_TILES[code] if tokens == "decode" else PREFILL_TILES[code]


def candidates(code: str, tokens: str) -> list[DecodeTile | PrefillTile]:
    """Tiles worth trying, the one that is built in first; each costs about a second to compile."""
    others: list[DecodeTile | PrefillTile] = []
    if tokens == "decode":
        others += [DecodeTile(*sizes) for sizes in product((4, 8, 16, 32), (256, 512), (2, 4))]
    else:
        pairs = (16, 32, 64) if tokens == "batch" else (64, 128)
        others += [PrefillTile(*sizes) for sizes in product(pairs, (64, 128), (128, 256), (4, 8))]
    first = built_in(code, tokens)
    return [first, *(tile for tile in others if tile != first)]
