"""Where the experts of a model that is being loaded go: into memory, into a file, or nowhere, since files have them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from moebius.cpu_experts.record_file import LayerFacts, RecordFile
from moebius.cpu_experts.record_writer import RecordWriter
from moebius.hf_plugin.checkpoints.read_ahead import ReadAhead
from moebius.hf_plugin.checkpoints.reading import Piece, Reader, Shards, Source, Stored, runs
from moebius.hf_plugin.running.held import HeldWeights

READERS = 4  # threads at least: they wait for the disk, and for Python's lock between two reads


class Intake:
    """Takes the experts' weights of a model, one by one as they come, or reads them itself.

    What goes wrong is raised by `finish`, since transformers would collect it and go on; weights are refused meanwhile.

    Args:
        helds: what holds each experts module's weights, by the module's name; tied modules have one name.
        threads: that read and copy weights.
        files: of the checkpoint, in their order; the kernel is asked for them ahead of what transformers reads.
        verify: is called with each module that is complete, while others are being read.
    """

    wants = True  # whether weights are taken, one by one
    lead = 2 << 30  # bytes of modules that are being read before one of them is waited for: their memory is final

    def __init__(
        self,
        helds: Mapping[str, HeldWeights],
        threads: int,
        files: Sequence[str],
        verify: Callable[[HeldWeights], None],
    ) -> None:
        self._helds, self._names = dict(helds), {id(held): name for name, held in helds.items()}
        self._verify = verify
        self._error: Exception | None = None
        self._folder = Path(files[0]).parent if files else Path()
        self._shards = Shards(files)
        self._undo = ExitStack()
        self._pool = ThreadPoolExecutor(max(threads, READERS), "moebius-load")
        self._undo.callback(partial(self._pool.shutdown, cancel_futures=True))
        self._reading: deque[tuple[HeldWeights, list[str], list[Future[None]]]] = deque()
        self._begun, self._nbytes = 0, sum(held.facts().nbytes for held in helds.values())
        self._bar = self._undo.enter_context(_progress(self._nbytes))
        self._bring(files)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """What can be read, by name."""
        return self._shards.tensors

    def take(self, held: HeldWeights, name: str, full_name: str, tensor: torch.Tensor) -> None:
        """Take one of a module's weights."""

        def fill() -> None:
            self._check_absent(held, name)
            expected = held.placeholders[name].shape
            if tensor.shape != expected:
                raise ValueError(
                    f"the checkpoint's {full_name} has shape {tuple(tensor.shape)}, but the configuration asks for "
                    f"{tuple(expected)}: the checkpoint and its config.json do not belong together, or {self._folder} "
                    "is incomplete; download or copy it again"
                )
            self._begin(held)
            held.fill(name, tensor)
            self._done(held, [name])

        self._unless_failed(fill)

    def read(self, held: HeldWeights, weights: Mapping[str, Sequence[Piece]]) -> None:
        """Begin to read some of a module's weights: by name, what files have of all experts."""

        def begin() -> None:
            for name in weights:
                self._check_absent(held, name)
            pieces = [piece for of_weight in weights.values() for piece in of_weight]
            self._reading.append((held, list(weights), self._reads(held, pieces)))
            self._await(self.lead)

        self._unless_failed(begin)

    def _reads(self, held: HeldWeights, pieces: Sequence[Piece]) -> list[Future[None]]:
        """Begin to bring pieces to where they belong."""
        records = held.store.records  # allocated here, and not by several threads
        return [self._pool.submit(self._fill, held, records, run) for run in runs(pieces)]

    def _fill(self, held: HeldWeights, records: torch.Tensor, run: Sequence[Piece]) -> None:
        with self._source() as source:
            for piece in run:
                piece.fill(held, records[piece.expert], source)

    def _source(self) -> AbstractContextManager[Source]:
        """Where one thread gets tensors from."""
        return closing(Reader())

    def refuse(self, error: Exception) -> None:
        """Have `finish` raise that a weight cannot be put together."""
        self._error = self._error or error

    def finish(self) -> RecordFile | None:
        """All weights have been offered.

        Returns:
            The file that holds them, or None where memory does.

        Raises:
            Exception: whatever went wrong.
            ValueError: weights are missing.
        """
        with self._undo:
            self._unless_failed(lambda: self._await(0))
            self._unless_failed(self._shards.check)
            if self._error is not None:
                try:
                    raise self._error
                finally:
                    self._error = None  # which has this in its traceback: no cycle
            for name, held in self._helds.items():
                if absent := ", ".join(sorted(held.absent)):
                    raise ValueError(
                        f"the checkpoint in {self._folder} has no {absent} for {name!r}: it is incomplete or belongs "
                        "to another architecture; download or copy it again"
                    )
            return self._finished()

    def abandon(self) -> None:
        """Nothing more is offered: end the threads, and delete what is being written."""
        self._undo.__exit__(RuntimeError, RuntimeError("the load has failed"), None)

    def _unless_failed(self, function: Callable[[], None]) -> None:
        if self._error is None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 (raised by `finish`)
                self._error = error

    def _check_absent(self, held: HeldWeights, name: str) -> None:
        reading = (names for other, names, _ in self._reading if other is held)
        if name not in held.absent or any(name in names for names in reading):
            raise ValueError(
                f"the checkpoint has {name} of {self._names[id(held)]!r} twice: there, and under the name it is tied to"
            )

    def _bring(self, files: Sequence[str]) -> None:
        """Have the files brought into memory ahead of what is taken."""
        self._ahead = self._undo.enter_context(closing(ReadAhead(files)))

    def _begin(self, held: HeldWeights) -> None:
        """A module's weights lie among each other: with the first, all of it is wanted."""
        if len(held.absent) == len(held.placeholders):
            self._begun += held.facts().nbytes
            self._ahead.advance(self._ahead.nbytes * self._begun // self._nbytes)

    def _await(self, left: int) -> None:
        """Wait for modules that are being read, until only so many bytes are left."""
        while sum(held.facts().nbytes for held, _, _ in self._reading) > left:
            held, names, futures = self._reading[0]
            for future in futures:
                future.result()
            self._reading.popleft()
            self._done(held, names)

    def _done(self, held: HeldWeights, names: Sequence[str]) -> None:
        """Some of a module's weights are there."""
        held.absent.difference_update(names)
        self._bar.update(held.facts().nbytes * len(names) // len(held.placeholders))
        if not held.absent:
            self._verify(held)
            self._complete(self._names[id(held)], held)

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

    lead = 0  # modules in memory beside the one that is read

    def __init__(
        self,
        helds: Mapping[str, HeldWeights],
        threads: int,
        files: Sequence[str],
        verify: Callable[[HeldWeights], None],
        path: Path,
        facts: Mapping[str, str],
    ) -> None:
        super().__init__(helds, threads, files, verify)
        self._path = path
        with self._undo:
            self._writer = self._undo.enter_context(RecordWriter(path, file_layers(helds), facts))
            self._undo = self._undo.pop_all()  # all stays open unless that fails

    def _complete(self, name: str, held: HeldWeights) -> None:
        self._writer.write(name, held.store.records, held.surplus)
        held.drop()

    def _finished(self) -> RecordFile:
        self._undo.pop_all().close()  # which gives the file its name
        return adopt(RecordFile(self._path), self._helds)


class FromFile:
    """Stands for an `Intake` where a file has the records already, so that no weight is wanted."""

    wants = False
    tensors: Mapping[str, Stored] = {}

    def __init__(self, helds: Mapping[str, HeldWeights], file: RecordFile) -> None:
        self._file = adopt(file, helds)
        self._error: Exception | None = None

    def take(self, held: HeldWeights, name: str, full_name: str, tensor: torch.Tensor) -> None:
        """Nothing is taken."""

    def read(self, held: HeldWeights, weights: Mapping[str, Sequence[Piece]]) -> None:
        """Nothing is read."""

    def refuse(self, error: Exception) -> None:
        """Have `finish` raise that a weight cannot be put together."""
        self._error = self._error or error

    def finish(self) -> RecordFile:
        """The file that holds the weights.

        Raises:
            Exception: what a weight was refused for.
        """
        if self._error is not None:
            raise self._error
        return self._file

    def abandon(self) -> None:
        """Nothing is open but the file, which goes with this."""


def file_layers(helds: Mapping[str, HeldWeights]) -> dict[str, LayerFacts]:
    """What a file of these weights holds."""
    return {name: held.facts() for name, held in helds.items()}


def adopt(file: RecordFile, helds: Mapping[str, HeldWeights]) -> RecordFile:
    """Let all weights be those in the mapped file."""
    for name, held in helds.items():
        held.adopt(file.records(name), file.extras(name), file.mapped)
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
