"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moebius.cpu_experts.executor import CpuExecutor


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[int, CpuExecutor]]:
    """An executor for each of some numbers of threads."""
    made = {threads: CpuExecutor(threads) for threads in (1, 2, 5)}
    yield made
    for executor in made.values():
        executor.close()
