"""A file whose bytes are used where the kernel keeps them: mapped, on large pages where its file system has them."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import torch

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux, which Python does not name


class MappedFile:
    """A file, open and mapped to be read; what is in it is never copied, and cannot be written.

    Another file may take its place under its name: this one stays. It must not be cut short: whoever touches what is
    gone is ended by the system (SIGBUS); `check_unchanged` sees it as long as nobody has.

    Args:
        path: the file, not empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        self.fd: int = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.fd)
        self._opened = self._state()
        pages = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # advice only
                pages.madvise(mmap.MADV_HUGEPAGE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.bytes: torch.Tensor = torch.frombuffer(pages, dtype=torch.uint8)

    def check_unchanged(self) -> None:
        """Compare size and time with those at opening; a mapping shows other bytes, or ends the process, after that.

        Raises:
            ValueError: the file was written to, or cut short, where it lies. One that replaces it does no harm.
        """
        if self._state() != self._opened:
            raise ValueError(
                f"{self.path} was changed while it was in use, and what it held is gone: load the model again, or "
                "convert its checkpoint again"
            )

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of a tensor that begins at any byte."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        storage = self.bytes.untyped_storage()[offset : offset + nbytes]
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(shape)  # type: ignore[call-overload]

    def populate(self, start: int, end: int) -> None:
        """Bring bytes into memory, and pages of them into this process; waits, without Python's lock.

        Two threads read a cold file of 3 GB so in 0.87 s, a plain read takes 1.1 s, and reading ahead of this, or
        reading instead of it, 1.0 to 1.1 s (2 cores, ext4 on Linux 6.18); pages are of 2 MB then.

        Raises:
            OSError: the file cannot be read.
            ValueError: it has become shorter.
        """
        start -= start % mmap.PAGESIZE
        if _madvise(self.bytes.data_ptr() + start, end - start, _POPULATE_READ):
            self.check_unchanged()
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))

    def _state(self) -> tuple[int, int]:
        facts = os.fstat(self.fd)
        return facts.st_size, facts.st_mtime_ns


def _madvise(address: int, nbytes: int, advice: int) -> int:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return int(function(address, nbytes, advice))
