"""Tensors of a checkpoint's files, read straight to where they belong.

A read waits in the kernel, without Python's lock, which safetensors' slices hold while they copy out of a mapping; and
what a file has lost meanwhile is an error here, where a mapping would end the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from math import prod
from typing import NamedTuple, Protocol

import torch

from moebius.kernels.experts import RecordLayout
from moebius.kernels.packing import CodedMatrix

RUN = 64 << 20  # bytes that one thread reads in order: enough for the kernel to read ahead of it

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
}  # fmt: skip
_REMEDY = "leave the files alone while they are loaded, and load again, or download or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, or a part of one that lies in one piece.

    Args:
        file: its path.
        offset: bytes from the file's start.
    """

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes from the file's start to the first byte after it."""
        return self.offset + self.nbytes

    def split(self, shape: tuple[int, ...]) -> list[Stored]:
        """The tensors of a shape that follow each other in this one."""
        nbytes = prod(shape) * self.dtype.itemsize
        count = prod(self.shape) // prod(shape)
        return [replace(self, offset=self.offset + number * nbytes, shape=shape) for number in range(count)]


class Reader:
    """Reads tensors one after the other, on one thread.

    It keeps the file open from one to the next, so that the kernel sees that it is read in order, and reads ahead.
    """

    def __init__(self) -> None:
        self._file: FileIO | None = None

    def read(self, stored: Stored, into: torch.Tensor) -> None:
        """Fill a contiguous tensor of the same dtype and shape, in host memory.

        Raises:
            ValueError: the file ends too early.
            OSError: it cannot be read.
        """
        if self._file is None or self._file.name != stored.file:
            self.close()
            self._file = FileIO(stored.file)
        self._file.seek(stored.offset)
        rest = into.view(-1).view(torch.uint8).numpy().data
        while rest:
            if not (count := self._file.readinto(rest)):
                raise ValueError(f"{stored.file} ends before its tensors do: {_REMEDY}")
            rest = rest[count:]

    def load(self, stored: Stored) -> torch.Tensor:
        """A tensor, in host memory; raises what `read` raises."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read(stored, tensor)
        return tensor

    def close(self) -> None:
        """Close the file that was read last."""
        if self._file is not None:
            self._file.close()


class Source(Protocol):
    """Where a file's tensors come from; `Reader`."""

    def read(self, stored: Stored, into: torch.Tensor) -> None:
        """Fill a contiguous tensor of the same dtype and shape, in host memory."""

    def load(self, stored: Stored) -> torch.Tensor:
        """A tensor, in host memory, that is not written to."""


class Record(Protocol):
    """An expert's record as far as files have it as it is; `HeldWeights`."""

    def fill_part(self, record: torch.Tensor, part: str, read: Callable[[torch.Tensor], None]) -> None:
        """Fill a matrix through what fills a tensor."""

    def fill_coded(self, record: torch.Tensor, matrices: Mapping[str, CodedMatrix]) -> None:
        """Fill matrices from what stands for them in a quantised checkpoint."""


class Piece(Protocol):
    """What files have of an expert."""

    @property
    def expert(self) -> int:
        """Its number."""

    @property
    def tensors(self) -> Sequence[Stored]:
        """All that is read."""

    def fill(self, held: Record, record: torch.Tensor, source: Source) -> None:
        """Read it into the expert's record."""

    def parts(self, layout: RecordLayout) -> Mapping[str, Stored]:
        """The parts of the expert's record that files have as the record would; none where any of them differs."""

    def check(self, source: Source) -> None:
        """Raise ValueError for what no weight can be."""


class Matrix(NamedTuple):
    """A matrix of an expert in a file, and where it belongs."""

    stored: Stored
    part: str
    expert: int

    @property
    def tensors(self) -> Sequence[Stored]:
        return [self.stored]

    def fill(self, held: Record, record: torch.Tensor, source: Source) -> None:
        held.fill_part(record, self.part, partial(source.read, self.stored))

    def parts(self, layout: RecordLayout) -> Mapping[str, Stored]:
        return {self.part: self.stored} if layout.parts()[self.part].dtype == self.stored.dtype else {}

    def check(self, source: Source) -> None:
        source.load(self.stored)  # any number can be a weight, once it is there


def runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """All pieces in the order of their files, in runs of about `RUN` bytes."""
    run, nbytes = list[Piece](), 0
    for piece in sorted(pieces, key=lambda piece: (piece.tensors[0].file, piece.tensors[0].offset)):
        run.append(piece)
        nbytes += sum(tensor.nbytes for tensor in piece.tensors)
        if nbytes >= RUN:
            yield run
            run, nbytes = [], 0
    if run:
        yield run


class Shards:
    """The tensors of a checkpoint's files, by name, from headers that safetensors has checked."""

    def __init__(self, files: Sequence[str]) -> None:
        self._seen = {file: _identity(file) for file in files}
        self.tensors = tensors_in(files)

    def check(self) -> None:
        """Compare the files with what they were.

        Raises:
            ValueError: one has been written or replaced, so that what was read may be of neither.
        """
        for file, seen in self._seen.items():
            if not os.path.exists(file) or _identity(file) != seen:
                raise ValueError(f"{file} has changed while it was loaded: {_REMEDY}")


def _identity(file: str) -> tuple[int, ...]:
    facts = os.stat(file)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def tensors_in(files: Iterable[str]) -> dict[str, Stored]:
    """All tensors of some files, by name.

    Raises:
        ValueError: a file is no safetensors file; the message names it.
    """
    return {name: tensor for file in files for name, tensor in _tensors(file).items()}


def _tensors(file: str) -> dict[str, Stored]:
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, os.fstat(opened.fileno()).st_size)))
        return {
            name: Stored(file, 8 + length + facts["data_offsets"][0], _DTYPES[facts["dtype"]], tuple(facts["shape"]))
            for name, facts in header.items()
            if facts.get("dtype") in _DTYPES
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of another file than has been checked
        raise ValueError(f"{file} has changed while it was loaded ({error}): {_REMEDY}") from error
