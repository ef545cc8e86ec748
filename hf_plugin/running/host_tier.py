"""Host memory as a cache of a file: a model larger than memory runs, as fast as its experts can be read.

The cache is the same class, with the same policies, as that of a GPU; its device is host memory, and its copies are
reads of whole records by threads. Experts are computed from the slots by the CPU executor; those in no slot are read
first. Where a step needs more experts than there are slots, it goes in rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import cycle
from time import perf_counter

import numpy as np
import psutil
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.record_file import RecordFile
from moebius.cpu_experts.store import ExpertStore, allocate
from moebius.gpu_cache.cache import CachedLayer, ExpertCache
from moebius.gpu_cache.device import Completion, Device, Launch, Transfer
from moebius.gpu_cache.worker import Job, Signal, Worker
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.running import expert_files
from moebius.kernels.routes import Routes, select

logger = logging.getLogger(__name__)

READERS = 2  # threads that read what a step waits for; one more reads ahead, so that no step stands behind guesses
_MEMORY = 0.05  # weight of a new observation: about the last 20 reads count


class HostDevice(Device):
    """Host memory in the place of a device's; a copy reads a record from a file.

    Args:
        read: reads a record, given as a view of the mapped file, into a slot.
    """

    torch_device = torch.device("cpu")
    flying_bytes = 0  # two records: a disk is slow

    def __init__(self, read: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._read = read
        self._readers = [Worker("moebius-read") for _ in range(READERS + 1)]
        self._ahead, *urgent = self._readers
        self._next = cycle(urgent)

    def allocate(self, slots: int, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return allocate(slots * nbytes).view(slots, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Completion | None, urgent: bool) -> Transfer:
        assert after is None or isinstance(after, Signal)

        def work() -> torch.Tensor:
            self._read(source, target)
            return target

        job = Job(work, () if after is None else (after,))
        (next(self._next) if urgent else self._ahead).submit(job)
        return job.completion

    def finish_copies(self) -> None:
        for reader in self._readers:
            reader.drain()

    def compute(self, work: Callable[[], torch.Tensor], after: Sequence[Completion]) -> Launch:
        raise RuntimeError("experts in host memory are computed by the CPU executor")

    def pin(self, host: torch.Tensor) -> bool:
        return False

    def unpin(self, host: torch.Tensor) -> None:
        raise RuntimeError("the records of a file are not pinned")

    def free_memory(self) -> int:
        return int(psutil.virtual_memory().available)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def open_host(
    options: Options, file: RecordFile | None, stores: Sequence[ExpertStore], executor: CpuExecutor
) -> HostTier | None:
    """Memory as a cache of the file that has the experts, if any, where it does not hold all of them."""
    if file is None:
        return None
    layers = list(file.layers.values())
    size = expert_files.budget(options, layers)
    if size is None or options.device != "cpu":  # records are used, or uploaded, where they are mapped
        file.verify(executor.threads)
    if size is None:
        return None
    if options.cpu_memory == "auto":
        logger.warning(
            "host memory has room for %.2f of %.2f GiB of experts, so the others are read from %s whenever they are "
            "needed; a smaller expert_format may fit", size / 2**30, sum(f.nbytes for f in layers) / 2**30, file.path,
        )  # fmt: skip
    return HostTier(file, stores, size, options.cache_policy, executor)


class HostTier:
    """The experts of all layers of a model in a file, of which memory holds as many as its budget allows.

    Args:
        file: holds the records of all stores.
        stores: of each layer, with records in the mapped file.
        budget: bytes of host memory for experts.
        policy: which expert deserves memory, as in `ExpertCache`.
        executor: computes the experts.
    """

    def __init__(
        self, file: RecordFile, stores: Sequence[ExpertStore], budget: int, policy: str, executor: CpuExecutor
    ) -> None:
        layers = [CachedLayer(store.spec, store.layout, store.records) for store in stores]
        self.cache: ExpertCache = ExpertCache(HostDevice(file.read), layers, budget, policy)
        self.cache.price = 0.0  # an expert that is foreseen is read once in any case, now or when it is needed
        self._executor = executor
        self._slots: list[ExpertStore] = []  # of each layer: the memory that its experts share with those of others
        for number, store in enumerate(stores):
            memory = self.cache.layer(number).memory
            self._slots.append(ExpertStore(store.spec, store.layout, len(memory), memory))
        self.read_us = 0.0  # microseconds of a read, of late above all; 0 before the first
        self._missed = 0
        self.reset_stats()

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        routes: Routes,
        out: torch.Tensor,
        meanwhile: Callable[[], None],
    ) -> None:
        """As `CpuExecutor.run`, for experts of which some may have to be read first.

        Args:
            routes: of one expert at least.
            meanwhile: called once, when the first reads have begun.

        Raises:
            ValueError: the file is damaged.
        """
        at_once: np.ndarray | None = None
        rest = routes
        while len(rest.experts):
            done, hit = self._round(layer, x, rest, out, meanwhile if at_once is None else None)
            at_once = hit if at_once is None else at_once
            rest = select(rest, ~done)
        if at_once is not None:
            missed = int(np.count_nonzero(~at_once))
            self.hits[layer] += len(at_once) - missed
            self.misses[layer] += missed
            self._missed += missed
            self.cache.layer(layer).used(routes.experts, at_once)
        for took_us in self.cache.copy_times():
            self.read_us += _MEMORY * (took_us - self.read_us) if self.read_us else took_us

    def take_misses(self) -> int:
        """Experts that were not in memory when their step began, since the last call."""
        missed, self._missed = self._missed, 0
        return missed

    def read_ahead(self, layer: int, experts: np.ndarray) -> None:
        """Begin to read experts (int32 [n], distinct, likeliest first) that are foreseen for a coming layer."""
        cache = self.cache.layer(layer)
        cache.prefetch(experts[cache.slots()[experts] < 0])

    def reset_stats(self) -> None:
        """All counters to zero."""
        layers = len(self._slots)
        self.hits: np.ndarray = np.zeros(layers, np.int64)  # experts of steps that were in memory
        self.misses: np.ndarray = np.zeros(layers, np.int64)  # that had to be read, or were being read
        self.stall_ms: np.ndarray = np.zeros(layers)  # waited for reads
        self.cache.counters.reset()

    def stats(self, layer: int) -> dict[str, float]:
        """Counters of a layer, as `LayerStats` names them."""
        counters = self.cache.counters
        return {
            "ram_hits": int(self.hits[layer]),
            "ram_misses": int(self.misses[layer]),
            "disk_reads": int(counters.uploads[layer]),
            "disk_bytes": int(counters.upload_bytes[layer]),
            "disk_us": float(counters.copy_us[layer]),
            "read_ahead": int(counters.prefetch_issued[layer]),
            "read_ahead_used": int(counters.prefetch_used[layer]),
            "stall_ms": float(self.stall_ms[layer]),
        }

    def close(self) -> None:
        """Give memory and threads back. Idempotent."""
        self.cache.close()

    def _round(
        self,
        layer: int,
        x: torch.Tensor,
        routes: Routes,
        out: torch.Tensor,
        meanwhile: Callable[[], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute what is in memory while the others are read, then those, as they come, as far as slots allow.

        Returns:
            Which experts have been computed, and which of them were there at once, each bool [A].
        """
        cache = self.cache.layer(layer)
        try:
            slots = cache.lookup(routes.experts)
            hit = slots >= 0
            slots[~hit] = cache.fetch(routes.experts[~hit])
            if meanwhile is not None:
                meanwhile()
            if hit.any():
                self._compute(layer, x, routes, slots, hit, out)
            for number in np.flatnonzero((slots >= 0) & ~hit):
                begun = perf_counter()
                cache.wait(slots[number : number + 1])
                self.stall_ms[layer] += (perf_counter() - begun) * 1e3
                cache.arrived(slots[number : number + 1])  # lets what is foreseen begin in its place
                self._compute(layer, x, routes, slots, np.arange(len(slots)) == number, out)
        finally:
            cache.finish()
        done = slots >= 0
        if not done.any():  # every slot is being filled with something else
            self.cache.drain()
        return done, hit

    def _compute(
        self, layer: int, x: torch.Tensor, routes: Routes, slots: np.ndarray, mask: np.ndarray, out: torch.Tensor
    ) -> None:
        chosen = select(routes, mask)
        self._executor.run(self._slots[layer], x, chosen._replace(experts=slots[mask]), out)
