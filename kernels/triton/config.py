"""How kernels are launched: the tiles that are built in, and others worth trying on a device."""

from __future__ import annotations

import os
from itertools import product
from typing import Any, NamedTuple

from moebius.kernels.formats import CODES, FLOATS

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides when it decorates a kernel

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # fused multiply-add, said here because Triton's default changes


class DecodeTile(NamedTuple):
    """What the programs of `decode` compute at once: rows of both projections, in units of 16 bytes."""

    rows: int  # of gate and of up, for one pair
    units: int  # of each of these rows, the row's own if that has fewer
    warps: int
    down_rows: int
    down_pairs: int  # of a token
    down_units: int
    down_warps: int


class PrefillTile(NamedTuple):
    """What a program of `prefill` computes, and how far it goes in one step."""

    pairs: int
    columns: int  # of the product, half of them the gate's where there is one
    depth_bytes: int  # of the operands; whole groups in every type
    warps: int


# Largest numbers of tokens of each class, which has tiles of its own. `decode` has one class: the order of its sums
# must not depend on how many tokens there are. From 17 on an expert often has more than a pair or two; before, a tile
# of `prefill` would be mostly padding.
DECODE_TOKENS = 16
TOKEN_CLASSES: dict[str, int | None] = {"decode": DECODE_TOKENS, "batch": 256, "prompt": None}

# What runs where nothing was tuned (`tuning.py`). For `decode`, from what compilers make of it for a GPU of 132
# multiprocessors that reads 4.8 TB/s, an expert of 768 x 2048 and 8 of them: whole rows, no values that spill, and all
# programs of a token running at once with at least 60 KB of weights on their way to each multiprocessor, where 22 hide
# the latency. The interpreter costs about 15 ms per program whatever its size, so tiles are large there.
_KINDS = (*FLOATS, *CODES)  # see `RecordLayout.code`
_BYTES, _NIBBLES = DecodeTile(4, 128, 2, 4, 8, 64, 4), DecodeTile(4, 64, 2, 8, 8, 32, 8)
_LARGE = DecodeTile(2, 32, 4, 2, 4, 32, 4)
DECODE_TILES: dict[str, DecodeTile] = dict.fromkeys(_KINDS, DecodeTile(2, 256, 1, 4, 8, 128, 8))
DECODE_TILES |= {"int8": _BYTES, "e4m3": _BYTES, "int4": _NIBBLES, "e2m1": _NIBBLES}
if INTERPRETED:
    DECODE_TILES = dict.fromkeys(_KINDS, _LARGE)

# For `prefill`. Few pairs an expert: time is that of reading weights, and rows without a pair are waste. Many pairs: a
# product is as fast as the level 2 cache brings its operands, 85 operations a byte with 128 x 256. That takes cards
# whose products read both operands from shared memory (Hopper); others run out of registers.
_BATCH, _PROMPT, _SMALL_PROMPT = (16, 128, 128, 4), (128, 256, 128, 8), (64, 128, 128, 4)
_PREFILL_TILES = [PrefillTile(*sizes) for sizes in (_BATCH, _PROMPT, _SMALL_PROMPT)]
if INTERPRETED:
    _PREFILL_TILES = [PrefillTile(128, 512, 1024, 4)] * 3
FP32_TILE = _PREFILL_TILES[0]  # products on ordinary cores keep operands in registers, and spill with any larger one
LARGE_SHARED = 200 << 10  # bytes that a block may use on the former cards


def token_class(tokens: int) -> str:
    """The class of so many tokens."""
    return next(name for name, most in TOKEN_CLASSES.items() if most is None or tokens <= most)


def built_in(code: str, tokens: str, shared: int = LARGE_SHARED) -> DecodeTile | PrefillTile:
    """The tile of records with this `RecordLayout.code` and a class of tokens, where nothing was tuned.

    Args:
        shared: bytes of shared memory that a block may use on the device.
    """
    batch, prompt, small_prompt = _PREFILL_TILES
    if tokens == "decode":
        return DECODE_TILES[code]
    if tokens == "batch":
        return batch
    return prompt if shared >= LARGE_SHARED else small_prompt


def candidates(code: str, tokens: str) -> list[DecodeTile | PrefillTile]:
    """Tiles worth trying, a built-in one first; a kernel takes half a second to compile."""
    if tokens == "decode":
        return _decode_candidates(code)
    first, few = built_in(code, tokens), tokens == "batch"
    pairs, columns = ((16, 32, 64), (64, 128, 256)) if few else ((64, 128), (128, 256))
    others = [PrefillTile(*sizes) for sizes in product(pairs, columns, (128, 256), (4, 8))]
    sums = [tile.pairs * tile.columns // (32 * tile.warps) for tile in others]  # of each thread
    return [first, *(tile for tile, n in zip(others, sums, strict=True) if tile != first and 16 <= n <= 128)]


def _decode_candidates(code: str) -> list[DecodeTile | PrefillTile]:
    """At least a unit for each thread, so that loads are as wide as can be, and few enough for its registers."""
    first, most = DECODE_TILES[code], 8 if CODES.get(code) == 4 else 16
    up = [(rows, first.units, warps) for rows, warps in product((1, 2, 4), (1, 2, 4))]
    down = [(rows, pairs, first.down_units, warps) for rows, pairs, warps in product((2, 4, 8), (4, 8), (4, 8))]
    up = [(rows, units, warps) for rows, units, warps in up if 1 <= units // (32 * warps) <= most // rows]
    down = [(r, p, units, warps) for r, p, units, warps in down if 1 <= p * units // (32 * warps) <= most // r]
    others = [DecodeTile(*one, *other) for one, other in product(up, down)]
    return [first, *(tile for tile in others if tile != first)]
