"""Where the command line writes: the document on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

out = Console()
err = Console(stderr=True)

Update = Callable[[str, float], None]


def print_json(document: Any) -> None:
    """Write one JSON document to stdout; floats that are not finite are refused, since JSON has none."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def hide_progress_of_libraries() -> None:
    """Keep the bars of transformers out of logs: they are drawn for a terminal."""
    if not err.is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextmanager
def progress_bar(title: str) -> Iterator[Update]:
    """A progress bar on stderr where that is a terminal, gone when done.

    The update takes a step's name and the fraction of it that is done.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda step, done: bar.update(task, description=f"{title}: {step}", completed=done)
