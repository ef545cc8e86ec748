"""A plain multi-threaded read of memory: the speed that no kernel reading the same bytes can exceed."""

from __future__ import annotations

import time
from statistics import median
from types import TracebackType

import numpy as np

from moebius.cpu_experts.crew import shared
from moebius.kernels.numba.integers import add_ints, load_ints, no_ints, sum_ints
from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import atomic_add, peek
from moebius.kernels.numba.units import word

DEFAULT_CACHE_BYTES = 64 << 20  # where the system does not tell the last-level cache's size

# Words of a job: the next unit and the sum, each alone on its cache line; addresses and numbers.
_NEXT, _SUM, _RECORDS, _RECORD_BYTES, _ROWS, _COUNT, _WORDS = 0, 8, 16, 17, 18, 19, 20
_UNIT, _LINE = 1 << 16, 64  # bytes that a thread takes at a time, and at once
_I64 = np.int64(0)


@entry("void(int64)", callback=True)
def _sum_rows(job):  # type: ignore[no-untyped-def]
    """Sum the words of chosen records, unit by unit until none is left: adding costs less than reading."""
    record_bytes, total = word(job, _RECORD_BYTES), no_ints()
    units = (record_bytes + _UNIT - 1) // _UNIT
    unit = atomic_add(job, 1)
    while unit < units * word(job, _COUNT):
        start, row = unit % units * _UNIT, peek(word(job, _ROWS) + 8 * (unit // units), _I64)
        address = word(job, _RECORDS) + row * record_bytes + start
        for offset in range(0, min(_UNIT, record_bytes - start), _LINE):
            total = add_ints(total, load_ints(address + offset))
        unit = atomic_add(job, 1)
    atomic_add(job + 8 * _SUM, np.int64(sum_ints(total)))


class RecordReader:
    """Reads chosen rows of a buffer on the threads that compute experts, and measures the time.

    Args:
        threads: how many threads share each read, the caller included.
        beside_torch: as of `CpuExecutor`.
    """

    def __init__(self, threads: int, *, beside_torch: bool = False) -> None:
        self.threads, self._beside_torch = threads, beside_torch
        self._leave = shared.join(self)

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def read(self, records: np.ndarray, rows: np.ndarray) -> tuple[float, int]:
        """Read each of `rows` (int64 [n]) of records (uint64 [R, W], contiguous, whole cache lines) once.

        Returns:
            Seconds, and the sum of their 32-bit words modulo 2^32.
        """
        function, job = _sum_rows.address, np.zeros(_WORDS, np.int64)
        job[_RECORDS:] = records.ctypes.data, records.strides[0], rows.ctypes.data, len(rows)
        start = time.perf_counter()
        shared.run(function, job.ctypes.data, self.threads - 1, self._beside_torch)
        return time.perf_counter() - start, int(job[_SUM]) % (1 << 32)


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
        return records.nbytes / median(reader.read(records, rows)[0] for _ in range(repeats)) / 1e9
