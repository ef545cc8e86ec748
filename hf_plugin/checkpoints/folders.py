"""Folders that are written aside, so that what others see of them is whole."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moebius.cpu_experts.record_writer import locked
from moebius.hf_plugin.running.expert_files import CONVERTED

_PARTIAL = ".partial"  # suffix of a folder that is being written


@contextmanager
def aside(parent: Path, name: str) -> Iterator[Path]:
    """A folder to write in, in `parent`; gone after the block unless it was renamed.

    What processes left that were killed is deleted when the next one asks for the same name.
    """
    for abandoned in parent.glob(f"{glob.escape(name)}.*{_PARTIAL}"):
        with suppress(OSError), locked(abandoned):  # nobody holds the lock of those
            shutil.rmtree(abandoned)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=_PARTIAL, dir=parent))
    try:
        with ExitStack() as held:
            with suppress(OSError):  # where folders cannot be locked, nobody removes them either
                held.enter_context(locked(folder))
            yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


@contextmanager
def replacing_weights(folder: Path, variant: str | None) -> Iterator[Path]:
    """A folder whose files move into `folder` when the block ends well, and replace the weights that are there.

    Before that nothing in `folder` changes. Files that others have open or mapped stay what they are.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with aside(folder, "save_pretrained") as written:
            yield written
            _replace(folder, written, variant)
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else has written into it
                folder.rmdir()
        raise


def with_variant(name: str, variant: str | None) -> str:
    """The name of a file of weights of a variant."""
    start, _, suffix = name.rpartition(".")
    return name if variant is None else f"{start}.{variant}.{suffix}"


def _replace(folder: Path, written: Path, variant: str | None) -> None:
    """Move files in, and delete weights that are none of them: transformers prefers one file to an index of several.

    The index is the first to go and the last to come, so that nobody finds shards of two models with one.
    """
    index = with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    stem = re.escape(with_variant(SAFE_WEIGHTS_NAME, variant).removesuffix(".safetensors"))
    weights = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    new = sorted((path.name for path in written.iterdir()), key=lambda name: (name == index, name))
    stale = {path.name for path in folder.iterdir() if weights.fullmatch(path.name)} - set(new)
    if variant is None:
        stale |= set(CONVERTED)
    if index in new:
        (folder / index).unlink(missing_ok=True)
    for name in new:
        os.replace(written / name, folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
