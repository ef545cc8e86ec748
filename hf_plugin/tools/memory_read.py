"""A plain multi-threaded read of memory: the speed that no kernel reading the same bytes can exceed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from types import TracebackType

import numpy as np

from moebius.kernels.numba.jit import entry

DEFAULT_CACHE_BYTES = 64 << 20  # where the system does not tell the last-level cache's size


@entry("uint64(uint64[:,::1], int64[::1], int64, int64)")
def _sum_words(records: np.ndarray, rows: np.ndarray, first: int, last: int) -> np.uint64:
    """Sum words first..last of the concatenated `rows` of records, uint64 [R, W]: adding costs less than reading."""
    width = records.shape[1]
    total = np.uint64(0)
    while first < last:
        row, start = rows[first // width], first % width
        stop = min(width, start + last - first)
        for word in records[row, start:stop]:
            total += word
        first += stop - start
    return total


class RecordReader:
    """Reads chosen rows of a buffer with a fixed number of threads and measures the time.

    Args:
        threads: how many threads share each read evenly.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="moebius-read")
        self.read(np.ones((1, 8), np.uint64), np.zeros(1, np.int64))  # compiles

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(self, records: np.ndarray, rows: np.ndarray) -> float:
        """Read each of `rows` (int64 [n]) of records (uint64 [R, W]) once.

        Returns:
            Seconds from the first thread's start to the last one's end, the cost of waking the threads left out.
        """
        words = len(rows) * records.shape[1]
        bounds = [words * i // self.threads for i in range(self.threads + 1)]
        spans = list(self._pool.map(lambda i: _timed(records, rows, bounds[i], bounds[i + 1]), range(self.threads)))
        return max(end for _, end in spans) - min(start for start, _ in spans)


def _timed(records: np.ndarray, rows: np.ndarray, first: int, last: int) -> tuple[float, float]:
    start = time.perf_counter()
    _sum_words(records, rows, first, last)
    return start, time.perf_counter()


def read_bandwidth(threads: int, cache_bytes: int | None, repeats: int = 7) -> float:
    """Measure how fast memory is read, in GB/s (1e9 bytes).

    Args:
        threads: reading threads.
        cache_bytes: the last-level cache; the buffer is 8 times as large, so that it cannot help. None if unknown.
        repeats: reads of which the median counts.
    """
    size = 8 * (cache_bytes or DEFAULT_CACHE_BYTES)
    records = np.ones((size >> 20, 1 << 17), np.uint64)  # written, since untouched pages all share one page of zeros
    rows = np.arange(len(records))
    with RecordReader(threads) as reader:
        return records.nbytes / median(reader.read(records, rows) for _ in range(repeats)) / 1e9
