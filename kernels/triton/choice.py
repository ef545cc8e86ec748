"""Which tiles a layer's kernels run with: those that were fastest on this device, or the ones that are built in.

What was tuned is kept as JSON, one file for each device, beside the compiled CPU kernels. Its name says the versions of
Triton and of the kernels as well, so that no tile outlives the code that it was timed with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.numba.jit import cache_root
from moebius.kernels.triton.config import (
    INTERPRETED,
    DecodeTile,
    PrefillTile,
    built_in,
    candidates,
    token_class,
)

logger = logging.getLogger(__name__)
Tile = DecodeTile | PrefillTile


class Kind(NamedTuple):
    """Layers and calls that share a tile."""

    device: str  # its name, such as "NVIDIA H100"
    code: str  # of `RecordLayout`
    gated: bool
    hidden: int  # the next power of two
    intermediate: int  # the same
    tokens: str  # one of `TOKEN_CLASSES`

    @classmethod
    def of(cls, device: str, spec: ExpertSpec, layout: RecordLayout, tokens: str) -> Kind:
        """The kind of calls of a layer with so many tokens as the class `tokens` says."""
        return cls(device, layout.code, spec.gated, _rounded(spec.hidden), _rounded(spec.intermediate), tokens)

    @property
    def label(self) -> str:
        """Its name in the file of its device."""
        return f"{self.code} {'gated' if self.gated else 'ungated'} {self.hidden} {self.intermediate} {self.tokens}"


def tile_for(spec: ExpertSpec, layout: RecordLayout, tokens: int, device: torch.device) -> Tile:
    """The tile of a call with so many tokens; nothing is timed here, and a file is read once a process."""
    if INTERPRETED or device.type == "cpu":
        return built_in(layout.code, token_class(tokens))
    return _chosen(Kind.of(device_name(device), spec, layout, token_class(tokens)), shared_memory(device))


@cache
def _chosen(kind: Kind, shared: int) -> Tile:
    return known(kind) or built_in(kind.code, kind.tokens, shared)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may use, 0 where the maker does not say."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


@cache
def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    return str(torch.get_device_module(device).get_device_properties(device).name)


def known(kind: Kind) -> Tile | None:
    """The tile that was fastest where this kind was tuned; None where it was not."""
    tiles = tuned(kind.device)
    if kind.label not in tiles:
        return None
    found = tiles[kind.label]
    tile = next((tile for tile in candidates(kind.code, kind.tokens) if found == list(tile)), None)
    if tile is None:
        logger.warning("%s is ignored for %s: %r is no tile there", _path(kind.device), kind.label, found)
    return tile


@cache
def tuned(device: str) -> dict[str, Any]:
    """The tiles of the device with that name, by the kinds' labels; empty, with a warning, where they are damaged."""
    path = _path(device)
    try:
        document = json.loads(path.read_bytes())
        if {key: document[key] for key in _facts(device)} != _facts(device):
            raise ValueError(f"it is of {document['device']!r}, Triton {document['triton']!r}")
        return dict(document["tiles"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("tuned tiles in %s are ignored: %s; moebius warmup writes them anew", path, error)
        return {}


def keep(kind: Kind, tile: Tile) -> Path:
    """Write down that `tile` is the fastest, for later processes; it is used from the next call on.

    Raises:
        OSError: the folder cannot be written.
    """
    tuned.cache_clear()  # another process may have written meanwhile
    document = _facts(kind.device) | {"tiles": tuned(kind.device) | {kind.label: list(tile)}}
    path = _path(kind.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(document, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    tuned.cache_clear()
    _chosen.cache_clear()
    return path


def _facts(device: str) -> dict[str, str]:
    return {"device": device, "triton": triton.__version__, "sources": _sources()}


def _path(device: str) -> Path:
    name = hashlib.sha256("\0".join(_facts(device).values()).encode()).hexdigest()[:20]
    return cache_root() / "triton" / f"{name}.json"


@cache
def _sources() -> str:
    """Hash of the kernels and of the layout of records."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()
