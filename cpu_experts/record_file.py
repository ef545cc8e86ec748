"""Experts in a file: the records of a model's layers as one safetensors file, written once, then mapped or read.

It is ordinary safetensors: for each layer a tensor uint8 [E, record bytes], then tensors of weights that no expert
computes with, then `CHECKSUMS`: uint32, the CRC-32 of the header (with its length), of each record, and of each extra
tensor, in the order of the file. The header's metadata holds what is needed to read the records (`LayerFacts`) and what
they were made from. Data start at a multiple of 4096 bytes, records at multiples of `RECORD_ALIGNMENT`.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebius.cpu_experts.direct_reads import PAGE, DirectReads
from moebius.cpu_experts.mapped_file import MappedFile
from moebius.kernels.experts import RECORD_ALIGNMENT, RecordLayout
from moebius.kernels.formats import coding

VERSION = "1"  # of the file's form; files of another are refused
CHECKSUMS = "checksums"
_MAX_HEADER = 100_000_000  # bytes, as safetensors itself allows
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a file says of one layer.

    Args:
        layout: of its records.
        num_experts: E.
        extras: weights beside the experts that a checkpoint of the layer holds, by name: dtype and shape.
    """

    layout: RecordLayout
    num_experts: int
    extras: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.num_experts * self.layout.nbytes


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the file: `count` parts of `nbytes` each from `start` on, and where their checksums begin."""

    start: int
    nbytes: int
    count: int
    checksum: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.nbytes


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Where everything is; the same for who writes and who reads."""

    header: bytes
    pieces: dict[str, Piece]
    checksums: int  # where they start
    size: int

    @classmethod
    def of(cls, layers: Mapping[str, LayerFacts], facts: Mapping[str, str]) -> FilePlan:
        tensors: dict[str, Any] = {}
        pieces: dict[str, Piece] = {}
        end, count = 0, 1  # the header's checksum comes first
        for name, dtype, shape, parts in _tensors(layers):
            nbytes = prod(shape) * dtype.itemsize
            code = "U8" if dtype == torch.uint8 else _CODES[dtype]
            tensors[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            pieces[name] = Piece(end, nbytes // parts, parts, count)
            end, count = end + nbytes, count + parts
        tensors[CHECKSUMS] = {"dtype": "U32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        described = {name: _describe(layer) for name, layer in layers.items()}
        metadata = {**facts, "moebius": VERSION, "layers": json.dumps(described)}
        text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
        data = -(-(8 + len(text)) // PAGE) * PAGE
        header = (data - 8).to_bytes(8, "little") + text.ljust(data - 8)
        moved = {name: Piece(p.start + data, p.nbytes, p.count, p.checksum) for name, p in pieces.items()}
        return cls(header, moved, data + end, data + end + 4 * count)


def _tensors(layers: Mapping[str, LayerFacts]) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Name, dtype, shape and number of checksums of each tensor: all records first, which keeps them aligned."""
    result: list[tuple[str, torch.dtype, tuple[int, ...], int]] = [
        (name, torch.uint8, (layer.num_experts, layer.layout.nbytes), layer.num_experts)
        for name, layer in layers.items()
    ]
    for name, layer in layers.items():
        result += [(f"{name}|{extra}", dtype, shape, 1) for extra, (dtype, shape) in layer.extras.items()]
    return result


def _describe(layer: LayerFacts) -> dict[str, Any]:
    extras = {name: [_CODES[dtype], *shape] for name, (dtype, shape) in layer.extras.items()}
    return {**asdict(layer.layout), "num_experts": layer.num_experts, "extras": extras}


class RecordFile:
    """A file of records, open for reading.

    Args:
        path: the file.

    Raises:
        ValueError: it is damaged or of another version; nothing of it was used.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        if (size := os.stat(path).st_size) < 8:
            raise self._damaged(f"it has {size} bytes")
        self.mapped: MappedFile = MappedFile(path)
        self._fd = self.mapped.fd
        self._direct = DirectReads(self._fd, self.path)
        header = self._header()
        self.facts, self.layers = self._parse(header)
        self._plan = FilePlan.of(self.layers, self.facts)
        size = os.fstat(self._fd).st_size
        if self._plan.header != header or self._plan.size != size:
            raise self._damaged(f"its {size:,} bytes are not the {self._plan.size:,} that its header describes")
        self._checksums = np.frombuffer(self._bytes(self._plan.checksums, size - self._plan.checksums), "<u4")
        self._proven: np.ndarray = np.zeros(len(self._checksums), bool)  # compared with what was read
        if self._checksums[0] != zlib.crc32(header):
            raise self._damaged("its header does not have the checksum that it was written with")
        self._base = self.mapped.bytes.data_ptr()
        self._starts = [self._plan.pieces[name].start for name in self.layers]
        self._names = list(self.layers)

    def records(self, name: str) -> torch.Tensor:
        """A layer's records in the mapped file, uint8 [E, nbytes]; they must not be written."""
        piece = self._plan.pieces[name]
        return self.mapped.bytes[piece.start : piece.end].view(piece.count, piece.nbytes)

    def extras(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of a layer's extra tensors, checked."""
        result = {}
        for extra, (dtype, shape) in self.layers[name].extras.items():
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            target = tensor.view(-1).view(torch.uint8).numpy()
            self._read(self._plan.pieces[f"{name}|{extra}"].start, target)
            self._check(f"{name}|{extra}", 0, target)
            result[extra] = tensor
        return result

    def read(self, record: torch.Tensor, target: torch.Tensor) -> None:
        """Read a record from the file, past the mapping, and leave nothing of it in the page cache.

        It is compared with its checksum when it is read for the first time; comparing takes a fifth of a read's time.

        Args:
            record: a view of one of `records`, uint8 [nbytes]; only its address counts.
            target: uint8 [nbytes] in host memory.

        Raises:
            ValueError: the file has changed or is damaged.
        """
        offset = record.data_ptr() - self._base
        name = self._names[bisect_right(self._starts, offset) - 1]
        piece = self._plan.pieces[name]
        number = (offset - piece.start) // piece.nbytes
        start = piece.start + number * piece.nbytes
        if not self._direct.read(start, target.numpy()):
            self._read(start, target.numpy())
            self._forget(start, piece.nbytes)
        if not self._proven[piece.checksum + number]:
            self._check(name, number, target.numpy())
            self._proven[piece.checksum + number] = True

    def verify(self, threads: int = 1) -> None:
        """Read all of the file and compare its checksums: for whoever computes with the mapped records. Only once.

        Raises:
            ValueError: the file has changed or is damaged.
        """
        if self._proven.all():
            return
        parts = [(name, number) for name, piece in self._plan.pieces.items() for number in range(piece.count)]
        largest = max(piece.nbytes for piece in self._plan.pieces.values())

        def check(first: int) -> None:
            buffer = np.empty(largest, np.uint8)
            for name, number in parts[first::threads]:
                piece = self._plan.pieces[name]
                target = buffer[: piece.nbytes]
                self._read(piece.start + number * piece.nbytes, target)
                self._check(name, number, target)

        with ThreadPoolExecutor(threads, "moebius-verify") as pool:
            for _ in pool.map(check, range(threads)):
                pass
        self.mapped.check_unchanged()
        self._proven[:] = True

    def _check(self, name: str, number: int, target: np.ndarray) -> None:
        piece = self._plan.pieces[name]
        if zlib.crc32(target.data) != self._checksums[piece.checksum + number]:
            layer, _, extra = name.partition("|")
            what = f"{extra} of {layer}" if extra else f"expert {number} of {layer}"
            raise self._damaged(f"{what} does not have the checksum that it was written with")

    def _read(self, offset: int, target: np.ndarray) -> None:
        view = target.data
        while len(view):
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise self._damaged(f"it ends at byte {offset:,}, before its data do")
            view, offset = view[count:], offset + count

    def _bytes(self, offset: int, count: int) -> np.ndarray:
        target = np.empty(count, np.uint8)
        self._read(offset, target)
        return target

    def _forget(self, offset: int, count: int) -> None:
        if hasattr(os, "posix_fadvise"):
            first = offset // PAGE * PAGE  # only whole pages are dropped
            os.posix_fadvise(self._fd, first, -(-(offset + count - first) // PAGE) * PAGE, os.POSIX_FADV_DONTNEED)

    def _header(self) -> bytes:
        size = os.fstat(self._fd).st_size
        start = self._bytes(0, 8).tobytes()
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _MAX_HEADER):
            raise self._damaged(f"its header claims {length:,} bytes")
        return start + self._bytes(8, length).tobytes()

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, LayerFacts]]:
        try:
            metadata = json.loads(header[8:])["__metadata__"]
            version = metadata["moebius"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged("it has no header of Moebius") from None
        if version != VERSION:
            raise ValueError(
                f"{self.path} has version {version!r:.20} of the form that holds experts, and this Moebius reads "
                f"{VERSION!r}: delete it and convert the checkpoint again"
            )
        try:
            layers = {str(name): _read_facts(entry) for name, entry in json.loads(metadata["layers"]).items()}
            facts = {str(k): v for k, v in metadata.items() if isinstance(v, str) and k not in ("moebius", "layers")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its description of the layers is not valid ({error!r:.80})") from None
        return facts, layers

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; delete it and convert the checkpoint again")


def _read_facts(entry: dict[str, Any]) -> LayerFacts:
    values = dict(entry)
    num_experts, extras = values.pop("num_experts"), values.pop("extras")
    layout = RecordLayout(**values)
    numbers = [num_experts, layout.hidden, layout.intermediate, *(n for _, *shape in extras.values() for n in shape)]
    coding(layout.format)  # raises where there is none
    if not all(type(n) is int and 0 < n < 1 << 40 for n in numbers):
        raise ValueError("a size that cannot be")
    if layout.nbytes % RECORD_ALIGNMENT:
        raise ValueError("records that are not aligned")
    return LayerFacts(
        layout, num_experts, {name: (_DTYPES[code], tuple(shape)) for name, (code, *shape) in extras.items()}
    )
