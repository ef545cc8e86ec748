"""Record what a patched model's routers decide while it generates, in the form that `moebius replay` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from torch import nn

from moebius.gpu_cache.event_log import EventLog


class Recorder:
    """Collects the routing of decode steps (one token a call) of all layers; prompts are not recorded.

    Nothing is done with it before it is saved, so that generating takes 1 % longer (six small layers).

    Args:
        experts: number of experts E of each of them, [L].
    """

    def __init__(self, experts: list[int]) -> None:
        if len(set(experts)) != 1:
            raise ValueError(f"a trace needs the same number of experts in every layer, but this model has {experts}")
        self._experts = experts[0]
        self._row: list[tuple[np.ndarray, np.ndarray]] = []
        self._ids: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._offsets = [0]
        self._groups: list[str] = []
        self._layers = len(experts)

    def record(self, layer: int, ids: np.ndarray, weights: np.ndarray) -> None:
        """One call of a layer: ids and float weights [T, k]."""
        if len(ids) != 1:
            self._row.clear()  # a prompt, or a batch
            return
        if layer == 0:
            self._row.clear()
        if layer != len(self._row):
            return
        self._row.append((ids[0].copy(), weights[0].copy()))
        if len(self._row) == self._layers:
            self._ids.append(np.stack([ids for ids, _ in self._row]))
            self._weights.append(np.stack([weights for _, weights in self._row]))

    def end_sequence(self, group: str) -> int:
        """What was recorded since the last call is one sequence of this subject; the number of its tokens."""
        tokens = len(self._ids) - self._offsets[-1]
        if tokens:
            self._offsets.append(len(self._ids))
            self._groups.append(group)
        return tokens

    def save(self, path: str | Path) -> None:
        """Write ``ids`` [T, L, k], ``probs``, ``offsets`` [S + 1], ``group`` [S], ``n_experts`` and ``top_k``.

        Raises:
            ValueError: nothing was recorded, or tokens were routed to no expert, which a trace cannot hold.
        """
        if not self._ids:
            raise ValueError("nothing was recorded: generate at least two tokens from each prompt, one at a time")
        ids, weights = np.stack(self._ids), np.stack(self._weights).astype(np.float32)
        order = np.argsort(-weights, axis=-1, kind="stable")
        ids, weights = np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)
        if ids.min() < 0 or ids.max() >= self._experts:
            raise ValueError(
                "some tokens were routed past the experts (sentinels, identity experts), unlike in a trace"
            )
        np.savez_compressed(
            path,
            ids=ids.astype(np.uint8 if self._experts <= 256 else np.uint16),
            probs=(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-20)).astype(np.float16),
            offsets=np.asarray(self._offsets, np.int64),
            group=np.asarray(self._groups),
            n_experts=self._experts,
            top_k=ids.shape[2],
            first_moe_layer=0,
        )


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Record the patched `model`'s decode steps while the block runs.

    Raises:
        ValueError: the model is not patched, or its layers differ in their number of experts.
    """
    from moebius.hf_plugin.patching import runtimes

    [runtime] = runtimes(model)
    runtime.recorder = Recorder([store.num_experts for store in runtime.stores])
    try:
        yield runtime.recorder
    finally:
        runtime.recorder = None


def start_event_logs(model: nn.Module) -> list[EventLog]:
    """Record from here on what each cache of a freshly patched model is told and decides; the caches start empty.

    Raises:
        ValueError: the model has no cache.
    """
    from moebius.hf_plugin.patching import runtimes
    from moebius.hf_plugin.running.tiers import distinct

    [runtime] = runtimes(model)
    with runtime.lock:
        logs = [log for tier in distinct(runtime.tiers) for log in tier.cache.record()]
    if not logs:
        raise ValueError("there is no cache whose events could be recorded; choose --device emulated, or a GPU")
    return logs


def save_event_logs(path: str | Path, logs: list[EventLog]) -> None:
    """Write event logs, one for each pool of slots, as arrays ``<pool>.<name>``; see `EventLog.arrays`."""
    arrays = {f"{number}.{name}": array for number, log in enumerate(logs) for name, array in log.arrays().items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_event_logs(path: str | Path) -> list[EventLog]:
    """What `save_event_logs` wrote.

    Raises:
        ValueError: the file is no such thing.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            pools = sum(name.endswith(".shape") for name in archive.files)
            names = ("shape", "name", "price", "scalars", "offsets", "numbers", "beside", "answers")
            return [EventLog.of_arrays({name: archive[f"{n}.{name}"] for name in names}) for n in range(pools)]
    except (BadZipFile, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not an event log ({error}); record one with moebius trace --events") from error
