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
from concurrent.futures import Future
from pathlib import Path

import psutil
import torch

from moebius.cpu_experts.mapped_file import MappedFile
from moebius.hf_plugin.checkpoints.intake import Intake
from moebius.hf_plugin.checkpoints.reading import RUN, Matrix, Piece
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


class InPlace(Intake):
    """Leaves the experts' weights in the files, and brings these into memory; what kernels cannot read is copied.

    The whole of the files is read in their order, from the start on: transformers finds the rest of the model there.
    """

    def _bring(self, files: Sequence[str]) -> None:
        super()._bring(())  # all is asked for at once here
        self._files = {file: MappedFile(file) for file in files}
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)  # else a load that fails reads on
        self._arriving = {name: self._populate(file) for name, file in self._files.items()}
        for held in self._helds.values():  # unless they turn out to be as kernels read them
            held.note = f"{_COPIED}they have biases there, or are in another order or dtype than the kernels read"

    def _populate(self, file: MappedFile) -> list[Future[None]]:
        size = len(file.bytes)
        return [self._pool.submit(file.populate, at, min(at + RUN, size)) for at in range(0, size, RUN)]

    def _reads(self, held: HeldWeights, pieces: Sequence[Piece]) -> list[Future[None]]:
        matrices = [piece for piece in pieces if isinstance(piece, Matrix)]
        if held.layout.dtype != held.dtype or {matrix.part for matrix in matrices} != held.layout.parts().keys():
            return super()._reads(held, pieces)
        parts: dict[str, list[torch.Tensor]] = {}
        arriving: dict[Future[None], None] = {}  # in the order of the files
        for stored, part, _ in sorted(matrices, key=lambda matrix: matrix.expert):
            tensor = self._files[stored.file].tensor(stored.offset, stored.dtype, stored.shape)
            parts.setdefault(part, []).append(tensor)
            last = stored.offset + stored.nbytes - 1
            arriving |= dict.fromkeys(self._arriving[stored.file][stored.offset // RUN : last // RUN + 1])
        held.use(parts, [self._files[name] for name in {matrix.stored.file: None for matrix in matrices}])
        held.note = _USED
        return list(arriving)


def into_memory(options: Options, helds: Collection[HeldWeights], files: Sequence[str]) -> type[Intake]:
    """The intake for a load whose experts have room in memory, and are plain numbers in the files.

    A device wants records, which it copies in one piece and pins.
    """
    stay = [held for held in helds if not held.layout.quantized and held.layout.dtype == held.dtype]
    if options.device != "cpu" or not stay:
        return Intake
    if (reason := slow_to_map(files)) is None:
        return InPlace
    for held in stay:
        held.note = f"{_COPIED}{reason}"
    return Intake
