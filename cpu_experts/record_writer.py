"""Writes a file of records: whole under its name, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from moebius.cpu_experts.record_file import FilePlan, LayerFacts

PARTIAL = ".partial"  # suffix of a file that is being written
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RecordWriter:
    """Writes layers in any order; the file appears under its name when the ``with`` block ends well, complete.

    Args:
        path: the file; another of this name is replaced.
        layers: all layers that will be written.
        facts: what else the header shall say.

    Raises:
        OSError: the folder cannot be written, or has too little space; the message says how much is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: Mapping[str, LayerFacts], facts: Mapping[str, str]
    ) -> None:
        self.path: Path = Path(path)
        self._layers, self._plan = dict(layers), FilePlan.of(layers, facts)
        self._left = set(self._plan.pieces)
        self._checksums = np.zeros((self._plan.size - self._plan.checksums) // 4, "<u4")
        self._checksums[0] = zlib.crc32(self._plan.header)
        self._fd = -1

    def __enter__(self) -> RecordWriter:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            self._check_space(folder)
            self._fd, self._partial = tempfile.mkstemp(PARTIAL, f"{self.path.name}.", folder)
        except OSError as error:
            raise self._explained(error) from error
        self._abandon = weakref.finalize(self, _abandon, self._fd, self._partial)  # also where nobody leaves the block
        try:
            _lock(self._fd)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self._plan.size)
            self._write(0, self._plan.header)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self._explained(error) from error
            raise
        return self

    def write(self, name: str, records: torch.Tensor, extras: Mapping[str, torch.Tensor]) -> None:
        """Write one layer.

        Args:
            records: uint8 [E, nbytes], in host memory.
            extras: the layer's extra tensors.

        Raises:
            OSError: the disk is full or failed.
        """
        assert records.shape == (self._layers[name].num_experts, self._layers[name].layout.nbytes), name
        try:
            self._write_piece(name, records.contiguous())
            for extra in self._layers[name].extras:
                self._write_piece(f"{name}|{extra}", extras[extra].contiguous().view(-1).view(torch.uint8)[None])
            self._forget()
        except OSError as error:
            raise self._explained(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            assert not self._left, f"never written: {sorted(self._left)[:3]}"
            self._write(self._plan.checksums, self._checksums.tobytes())
            os.fchmod(self._fd, 0o444)  # whoever wants to change a file that may be mapped has to replace it
            os.fsync(self._fd)
            os.replace(self._partial, self.path)
        except BaseException as failed:
            self._abandon()
            if isinstance(failed, OSError):
                raise self._explained(failed) from failed
            raise
        self._abandon.detach()
        os.close(self._fd)
        _sync_folder(self.path.parent)

    def _write_piece(self, name: str, parts: torch.Tensor) -> None:
        piece = self._plan.pieces[name]
        for number, part in enumerate(parts.numpy()):
            self._checksums[piece.checksum + number] = zlib.crc32(part)
        self._write(piece.start, parts.view(-1).numpy().data)
        self._left.discard(name)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._fd, view[: 1 << 30], offset)
            view, offset = view[count:], offset + count

    def _forget(self) -> None:
        """Let the disk have what was written, so that the page cache does not grow with the file."""
        if hasattr(os, "posix_fadvise"):
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _check_space(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if free < self._plan.size:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.2f} GiB are free")

    def _explained(self, error: OSError) -> OSError:
        size = f"{self._plan.size / 2**30:.2f} GiB"
        if error.errno in _NO_SPACE:
            remedy = f"the file needs {size}: free space, or choose a folder on another disk"
        else:
            remedy = f"a folder that can be written and has {size} free is needed"
        return OSError(
            error.errno, f"cannot write {self.path} ({error.strerror}); {remedy} (MOEBIUS_CACHE_DIR: of cached files)"
        )


def _abandon(fd: int, partial: str) -> None:
    os.close(fd)
    with suppress(FileNotFoundError):
        os.unlink(partial)


def _remove_abandoned(folder: Path) -> None:
    """Delete what writers left that were killed: nobody holds their lock."""
    for partial in folder.glob(f"*.safetensors.*{PARTIAL}"):
        with suppress(OSError), locked(partial):
            partial.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder within the block; OSError where somebody else does, or where there are no such locks."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Hold a file as long as it is open; OSError where somebody else does."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows, where an open file cannot be deleted
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure, where folders can be synchronised."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
