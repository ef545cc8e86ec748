"""Reads past the page cache, for threads that read beside computation and should not take its cores.

A direct read takes 0.07 s of a core for a GB, one through the page cache 0.5 s (records of 3 MB, a virtual disk of
1.1 GB/s, which one thread keeps busy). It goes straight into memory where file and memory allow that.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

PAGE = 4096


class DirectReads:
    """Reads of one file past the page cache; from any number of threads.

    Args:
        fd: the open file, which may have another name by now.
        path: that it had.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._path, self._fd = path, -1
        self._room = threading.local()
        if hasattr(os, "O_DIRECT"):
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                self._refused(error)
            else:
                weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, target: np.ndarray) -> bool:
        """Fill target (uint8 [n]); False where it must be read in another way: nothing is known of its contents."""
        if self._fd < 0:
            return False
        skipped = offset % PAGE
        count = -(-(skipped + len(target)) // PAGE) * PAGE  # whole pages, at addresses of pages
        straight = count == len(target) and target.ctypes.data % PAGE == 0
        view = target.data if straight else self._buffer(count)
        try:
            done = os.preadv(self._fd, [view], offset - skipped)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = -1  # its file is closed with this object
            self._refused(error)
            return False
        if done < skipped + len(target):
            return False
        if not straight:
            target[:] = np.frombuffer(view, np.uint8, len(target), skipped)
        return True

    def _buffer(self, count: int) -> memoryview:
        """This thread's own pages."""
        if getattr(self._room, "size", 0) < count:
            self._room.pages, self._room.size = mmap.mmap(-1, count), count
        return memoryview(self._room.pages)[:count]

    def _refused(self, error: OSError) -> None:
        logger.info("%s is read through the page cache: there are no direct reads (%s)", self._path, error)
