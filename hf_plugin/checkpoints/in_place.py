"""Experts that stay in the checkpoint's files: mapped, held in memory once, and loaded as fast as files are read.

A checkpoint of 3.09 GB, cold, loads in 1.12 to 1.22 s with single experts, in 1.08 to 1.09 s packed; a plain read of it
takes 0.99 to 1.13 s, copying the experts 1.51 to 1.70 s (two cores of a Zen 5, ext4 on Linux 6.18). It then generates
46.4 tokens/s, with copies on huge pages 47.2 (medians, in turn).
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import psutil
import torch

from moebius.cpu_experts.mapped_file import MappedFile
from moebius.hf_plugin.checkpoints.intake import READERS, Intake
from moebius.hf_plugin.checkpoints.reading import RUN, Piece, Source, Stored, runs
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.running.held import HeldWeights

# Linux from which on a file system's page cache has large pages ("large folios") without further ado. On pages of 4 KiB
# a layer of 8 experts of 9.4 MB takes 1.59 ms, 19 % longer than in memory.
_LARGE_PAGES = {"xfs": (5, 18), "ext4": (6, 16), "btrfs": (7, 2)}
_SUPPORT = Path("/sys/kernel/mm/transparent_hugepage")  # is there where the kernel was built with large pages
_USED = "are used in the checkpoint's files, which are mapped"
_COPIED = "were copied out of the checkpoint's files: "


def slow_to_map(files: Sequence[str]) -> str | None:
    """Why experts would be computed more slowly in mapped files than in memory; None where they are as fast."""
    if not _SUPPORT.is_dir():
        return "this system has no large pages for mapped files"
    release = os.uname().release
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    for folder in {os.path.dirname(os.path.realpath(file)) for file in files}:
        system = _file_system(folder)
        if version < _LARGE_PAGES.get(system, (1 << 30,)):
            return f"{system} of Linux {release} is not known to have large pages, and decoding would be slower"
    return None


def _file_system(folder: str) -> str:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(folder).is_relative_to(mount.mountpoint)]
    return max(reversed(mounts), key=lambda mount: len(mount.mountpoint)).fstype  # the last one mounted is seen


class _Arrival:
    """Mapped files that are being brought into memory, as a whole and in their order; a source of their tensors."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = {file: MappedFile(file) for file in files}
        self._pool = ThreadPoolExecutor(READERS, "moebius-populate")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)  # else a load that fails reads on
        self._runs = {name: self._populate(file) for name, file in self.files.items()}

    def _populate(self, file: MappedFile) -> list[Future[None]]:
        size = len(file.bytes)
        return [self._pool.submit(file.populate, at, min(at + RUN, size)) for at in range(0, size, RUN)]

    def close(self) -> None:
        """Bring no more, and wait for the threads to end."""
        self._pool.shutdown(cancel_futures=True)

    def load(self, stored: Stored) -> torch.Tensor:
        """A tensor where it lies in its mapped file, once it is in memory."""
        for run in self._runs[stored.file][stored.offset // RUN : (stored.end - 1) // RUN + 1]:
            run.result()
        return self.files[stored.file].tensor(stored.offset, stored.dtype, stored.shape)

    def read(self, stored: Stored, into: torch.Tensor) -> None:
        """Copy a tensor."""
        into.copy_(self.load(stored))


class InPlace(Intake):
    """Leaves the experts' weights in the files, and brings these into memory; what kernels cannot read is copied.

    The whole of the files is read in their order, from the start on: transformers finds the rest of the model there.
    """

    def _bring(self, files: Sequence[str]) -> None:
        super()._bring(())  # all is asked for at once here
        self._arrival = self._undo.enter_context(closing(_Arrival(files)))
        for held in self._helds.values():  # unless they turn out to be as kernels read them
            held.note = f"{_COPIED}they have biases there, or are in another order or dtype than the kernels read"

    def _reads(self, held: HeldWeights, pieces: Sequence[Piece]) -> list[Future[None]]:
        found = [piece.parts(held.layout) for piece in sorted(pieces, key=lambda piece: piece.expert)]
        known, files = held.layout.parts(), self._arrival.files
        if not all(found) or {part for parts in found for part in parts} != known.keys():
            return super()._reads(held, pieces)
        tensors: dict[str, list[torch.Tensor]] = {}
        for part, stored in (item for parts in found for item in parts.items()):
            there = files[stored.file].tensor(stored.offset, known[part].dtype, known[part].shape)
            tensors.setdefault(part, []).append(there)
        held.use(tensors, [files[name] for name in {stored.file: None for parts in found for stored in parts.values()}])
        held.note = _USED
        return [self._pool.submit(self._check, run) for run in runs(pieces)]

    def _check(self, run: Sequence[Piece]) -> None:
        for piece in run:
            piece.check(self._arrival)

    def _source(self) -> AbstractContextManager[Source]:
        return nullcontext(self._arrival)


def into_memory(options: Options, helds: Collection[HeldWeights], files: Sequence[str]) -> type[Intake]:
    """The intake for a load whose experts have room in memory.

    A device wants records, which it copies in one piece and pins.
    """
    stay = [held for held in helds if held.lossless]
    if options.device != "cpu" or not stay:
        return Intake
    if (reason := slow_to_map(files)) is None:
        return InPlace
    for held in stay:
        held.note = f"{_COPIED}{reason}"
    return Intake
