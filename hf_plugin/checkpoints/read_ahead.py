"""Asks for files ahead of a load that reads them through a mapping, whose page faults are small and wait."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LEAD = 256 << 20  # bytes ahead of those asked for: enough to keep a disk at work, too few to be evicted before use
PIECE = 1 << 20  # bytes asked for at once; the kernel cuts what is more than its read-ahead window


class ReadAhead:
    """Has the kernel read files in their order, a bounded number of bytes ahead; nothing where it takes no advice.

    Its thread only gives advice, which waits where the disk's queue is full. 0.69 GB of single experts, cold, stream in
    0.87 s, without it in 1.23 s; reading on the thread instead took 1.34 s (2 cores, medians of 3). What cannot be
    opened is left to the load, which meets the same error and raises it.

    Args:
        files: in the order in which they are loaded.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.nbytes = sum(Path(file).stat().st_size for file in files)
        self.position = 0  # bytes that have been asked for
        self._pieces, self._ended = _pieces(files), False
        self._pool = ThreadPoolExecutor(1, "moebius-read-ahead")
        self.advance(0)

    def advance(self, taken: int) -> None:
        """Let it ask for `LEAD` bytes more than the first `taken` bytes of all files; returns at once."""
        self._pool.submit(self._ask, taken + LEAD)

    def close(self) -> None:
        """End, and wait for the thread to end."""
        self._ended = True
        self._pool.shutdown(cancel_futures=True)
        self._pieces.close()

    def _ask(self, until: int) -> None:
        while not self._ended and self.position < until and (count := next(self._pieces, 0)):
            self.position += count


def _pieces(files: Sequence[str]) -> Generator[int, None, None]:
    """Asks for piece after piece, and yields the bytes of each."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, PIECE):
                os.posix_fadvise(file.fileno(), start, PIECE, os.POSIX_FADV_WILLNEED)
                yield min(PIECE, size - start)
