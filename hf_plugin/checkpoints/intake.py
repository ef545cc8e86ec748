"""Where the experts of a model that is being loaded go: into memory, into a file, or nowhere, since a file has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from moebius.cpu_experts.record_file import LayerFacts, RecordFile
from moebius.cpu_experts.record_writer import RecordWriter
from moebius.hf_plugin.checkpoints.read_ahead import ReadAhead
from moebius.hf_plugin.running.held import HeldWeights
from moebius.kernels.packing import CodedMatrix


class Intake:
    """Takes the experts' weights of a model, one by one as they are read.

    What goes wrong is raised by `finish`, since transformers would collect it and go on; weights are refused meanwhile.

    Args:
        helds: what holds each experts module's weights, by the module's name; tied modules have one name.
        threads: that copy weights.
        files: of the checkpoint, in their order; they are read ahead of the weights.
    """

    def __init__(self, helds: Mapping[str, HeldWeights], threads: int, files: Sequence[str]) -> None:
        self._helds, self._names = dict(helds), {id(held): name for name, held in helds.items()}
        self._error: Exception | None = None
        self._folder = Path(files[0]).parent if files else Path()
        self._undo = ExitStack()
        self._pool = self._undo.enter_context(ThreadPoolExecutor(threads, "moebius-load"))
        self._begun, self._nbytes = 0, sum(held.facts().nbytes for held in helds.values())
        self._bar = self._undo.enter_context(_progress(self._nbytes))
        self._ahead = self._undo.enter_context(closing(ReadAhead(files)))

    wants = True  # whether weights are taken, one by one

    def take(self, held: HeldWeights, name: str, full_name: str, tensor: torch.Tensor) -> None:
        """Take one of a module's weights."""

        def fill() -> bool:
            if name not in held.absent:
                raise ValueError(f"the checkpoint has {full_name} twice: under this name, and where it is tied to")
            expected = held.placeholders[name].shape
            if tensor.shape != expected:
                raise ValueError(
                    f"the checkpoint's {full_name} has shape {tuple(tensor.shape)}, but the configuration asks for "
                    f"{tuple(expected)}: the checkpoint and its config.json do not belong together, or {self._folder} "
                    "is incomplete; download or copy it again"
                )
            held.fill(name, tensor)
            return True

        self._taken(held, fill)

    def take_stacked(self, held: HeldWeights, name: str, experts: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Take one of a module's weights as the tensors of single experts; False where that is not possible."""
        return self._taken(held, lambda: held.fill_stacked(name, experts, self._each))

    def take_coded(self, held: HeldWeights, name: str, matrices: Callable[[int], Mapping[str, CodedMatrix]]) -> None:
        """Take one of a module's weights as each expert's coded matrices."""

        def fill() -> bool:
            held.fill_coded(name, matrices, self._each)
            return True

        self._taken(held, fill)

    def refuse(self, full_name: str, error: Exception) -> None:
        """Have `finish` raise that a weight cannot be put together."""
        self._error = self._error or ValueError(
            f"{full_name} cannot be put together from the tensors in {self._folder} ({error}): the checkpoint is "
            "incomplete or belongs to another architecture; download or copy it again"
        )

    def finish(self) -> RecordFile | None:
        """All weights have been offered.

        Returns:
            The file that holds them, or None where memory does.

        Raises:
            Exception: whatever went wrong.
            ValueError: weights are missing.
        """
        with self._undo:
            if self._error is not None:
                raise self._error
            for name, held in self._helds.items():
                if absent := ", ".join(sorted(held.absent)):
                    raise ValueError(
                        f"the checkpoint in {self._folder} has no {absent} for {name!r}: it is incomplete or belongs "
                        "to another architecture; download or copy it again"
                    )
            return self._finished()

    def _taken(self, held: HeldWeights, fill: Callable[[], bool]) -> bool:
        if self._error is not None:
            return True
        try:
            before = len(held.absent)
            if before == len(held.placeholders):  # a module's weights lie among each other: all of it is wanted now
                self._begun += held.facts().nbytes
                self._ahead.advance(self._ahead.nbytes * self._begun // self._nbytes)
            if not fill():
                return False
            self._bar.update(held.facts().nbytes * (before - len(held.absent)) // len(held.placeholders))
            if not held.absent:
                self._complete(self._names[id(held)], held)
        except Exception as error:  # noqa: BLE001 (raised by `finish`)
            self._error = error
        return True

    def _each(self, function: Callable[[int], None], count: int) -> None:
        for _ in self._pool.map(function, range(count)):
            pass

    def _complete(self, name: str, held: HeldWeights) -> None:
        """All weights of a module are there."""

    def _finished(self) -> RecordFile | None:
        return None


class IntoFile(Intake):
    """Writes each module's records to a file as soon as they are complete, and frees them.

    Args:
        path: of the file.
        facts: what else it shall say, as what it is made from.
    """

    def __init__(
        self,
        helds: Mapping[str, HeldWeights],
        threads: int,
        files: Sequence[str],
        path: Path,
        facts: Mapping[str, str],
    ) -> None:
        super().__init__(helds, threads, files)
        self._path = path
        self._writer = self._undo.enter_context(RecordWriter(path, file_layers(helds), facts))

    def _complete(self, name: str, held: HeldWeights) -> None:
        self._writer.write(name, held.store.records, held.surplus)
        held.drop()

    def _finished(self) -> RecordFile:
        self._undo.pop_all().close()  # which gives the file its name
        return adopt(RecordFile(self._path), self._helds)


class FromFile:
    """Stands for an `Intake` where a file has the records already, so that no weight is wanted."""

    wants = False

    def __init__(self, helds: Mapping[str, HeldWeights], file: RecordFile) -> None:
        self._file = adopt(file, helds)

    def take(self, held: HeldWeights, name: str, full_name: str, tensor: torch.Tensor) -> None:
        """Nothing is taken."""

    def take_stacked(self, held: HeldWeights, name: str, experts: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Nothing is taken."""
        return True

    def finish(self) -> RecordFile:
        """The file that holds the weights."""
        return self._file


def file_layers(helds: Mapping[str, HeldWeights]) -> dict[str, LayerFacts]:
    """What a file of these weights holds."""
    return {name: held.facts() for name, held in helds.items()}


def adopt(file: RecordFile, helds: Mapping[str, HeldWeights]) -> RecordFile:
    """Let all weights be those in the mapped file."""
    for name, held in helds.items():
        held.adopt(file.records(name), file.extras(name))
    return file


class _Bar(tqdm):
    """A bar without tqdm's monitor thread, which would stay."""

    monitor_interval = 0


def _progress(nbytes: int) -> _Bar:
    """Bytes of experts and their rate, shown where transformers shows its own bars."""
    return _Bar(
        total=nbytes,
        desc="Loading experts",
        unit="B",
        unit_scale=True,
        disable=not logging.is_progress_bar_enabled(),
    )
