"""Which file holds the experts of a checkpoint as records, and when host memory does not."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from moebius.cpu_experts.record_file import LayerFacts, RecordFile
from moebius.hf_plugin.options import Options, parse_memory
from moebius.kernels.numba.jit import cache_root

logger = logging.getLogger(__name__)

EXPERTS = "experts.safetensors"  # in the folder of a converted checkpoint
REST, GUARD = "model-rest.safetensors", "model-experts-elsewhere.safetensors"  # beside it: see `converting`
CONVERTED = (EXPERTS, REST, GUARD)
CONVERSIONS = "moebius_conversions"  # in the metadata of its index
# Left free in host memory by cpu_memory="auto": room for the rest of the model, the KV cache and the system.
AUTO_RESERVE = 0.1  # of the free memory,
AUTO_RESERVE_BYTES = 2 << 30  # and this much


def beside(checkpoint_files: Sequence[str]) -> RecordFile | None:
    """The file of a converted checkpoint, or None for a stock one, as may have been saved into the same folder.

    Raises:
        ValueError: it is damaged, or missing.
    """
    guard = next((path for file in checkpoint_files if (path := Path(file)).name == GUARD), None)
    if guard is None:
        return None
    if not (path := guard.with_name(EXPERTS)).is_file():
        raise ValueError(
            f"{path} is missing, which has the experts of this converted checkpoint: download or copy it again, or "
            "convert the checkpoint again"
        )
    return RecordFile(path)


def conversions(checkpoint_files: Sequence[str]) -> list[list[str]]:
    """Source patterns of the conversions by which the original of a converted checkpoint was loaded.

    They are in the metadata of its index, and saving reverses them.

    Raises:
        ValueError: the index does not have them.
    """
    index = Path(checkpoint_files[0]).parent / SAFE_WEIGHTS_INDEX_NAME
    try:
        return list(json.loads(index.read_text())["metadata"][CONVERSIONS])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} does not say how the original of this converted checkpoint was laid out ({error!r}): download or "
            "copy it again, or convert the checkpoint again"
        ) from error


def budget(options: Options, layers: Sequence[LayerFacts]) -> int | None:
    """Bytes of host memory for the experts of these layers, or None where all have room.

    Raises:
        ValueError: there is no room for a single expert.
    """
    total, least = sum(layer.nbytes for layer in layers), sum({layer.layout.nbytes for layer in layers})
    wanted = parse_memory(options.cpu_memory, total)
    if wanted is None:
        wanted = int(psutil.virtual_memory().available * (1 - AUTO_RESERVE)) - AUTO_RESERVE_BYTES
    if wanted < least:
        raise ValueError(
            f"cpu_memory={options.cpu_memory!r} is {max(wanted, 0):,} bytes, less than one expert of each size "
            f"({least:,} bytes); all experts take {total:,} bytes: give more"
        )
    return None if wanted >= total else wanted


def cached(checkpoint_files: Sequence[str], layers: Mapping[str, LayerFacts]) -> tuple[Path, dict[str, str]]:
    """Where the records of a checkpoint are kept between processes, and the facts that the file says of its source.

    The name depends on all that decides what is in the file: the checkpoint's files (name, size, time of the last
    change, header) and the layers' layouts. A file whose records are of another checkpoint is never found.
    """
    source = json.dumps([_identity(Path(file)) for file in sorted(checkpoint_files)])
    digest = hashlib.sha256(f"{source} {sorted((name, repr(facts)) for name, facts in layers.items())}".encode())
    folder = Path(checkpoint_files[0]).parent.name
    return _cache_folder() / f"{folder}-{digest.hexdigest()[:20]}.safetensors", {"source": source}


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of records that is kept between processes.

    Args:
        usable: whether the checkpoint that it was made of is still there, unchanged.
    """

    path: str
    nbytes: int
    usable: bool


def cached_files() -> list[CachedFile]:
    """All files in the cache folder; what cannot be read as one is not usable."""
    paths = sorted(_cache_folder().glob("*.safetensors"))
    return [CachedFile(str(path), path.stat().st_size, _is_usable(path)) for path in paths]


def remove_unusable() -> None:
    """Delete files whose checkpoint is gone or has changed: their names are never asked for again."""
    for file in cached_files():
        if not file.usable:
            logger.info("%s is deleted: the checkpoint that it was made of is gone or has changed", file.path)
            with suppress(OSError):  # in a folder that cannot be written, of which the writer will tell
                Path(file.path).unlink()


def _is_usable(path: Path) -> bool:
    try:
        source = json.loads(RecordFile(path).facts["source"])
        return all(list(_identity(Path(name))) == [name, *facts] for name, *facts in source)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _cache_folder() -> Path:
    return cache_root() / "experts"


def open_for(path: Path, layers: Mapping[str, LayerFacts]) -> RecordFile:
    """The file at a path, which must hold exactly these layers.

    Raises:
        ValueError: it is damaged, or holds others.
    """
    return checked(RecordFile(path), layers)


def checked(file: RecordFile, layers: Mapping[str, LayerFacts]) -> RecordFile:
    """The file, which must hold exactly these layers.

    Raises:
        ValueError: it holds others.
    """
    for name in {**layers, **file.layers}:
        found, wanted = file.layers.get(name), layers.get(name)
        if found != wanted:
            raise ValueError(
                f"{file.path} holds {found or 'nothing'} for the experts of {name!r}, where the model's configuration "
                f"asks for {wanted or 'nothing'}: it belongs to another checkpoint; convert the checkpoint again"
            )
    return file


def _identity(path: Path) -> tuple[str, int, int, str]:
    facts = path.stat()
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), 100_000_000))
    return os.path.abspath(path), facts.st_size, facts.st_mtime_ns, hashlib.sha256(header).hexdigest()
