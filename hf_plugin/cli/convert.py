"""`moebius convert`: a checkpoint whose experts load by mapping, and back."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from moebius.hf_plugin.checkpoints import converting
from moebius.hf_plugin.cli.console import hide_progress_of_libraries, out
from moebius.hf_plugin.running.expert_files import EXPERTS


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub name; with --to-stock or --check a converted folder.")],
    target: Annotated[Path | None, typer.Argument(help="A folder that does not exist yet.")] = None,
    format: Annotated[str, typer.Option(help="As expert_format of moebius.patch.")] = "native",
    to_stock: Annotated[
        bool, typer.Option("--to-stock", help="Write a stock checkpoint from a converted one.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare all checksums of a converted checkpoint.")] = False,
) -> None:
    """Write a checkpoint whose experts are in one file, in the format that runs, so that it loads in seconds."""
    if check:
        if target is not None:
            raise ValueError("--check takes one folder")
        nbytes = converting.check(source)
        out.print(f"{source}: {nbytes / 1e9:.2f} GB of experts, all as they were written", highlight=False)
        return
    if target is None:
        raise ValueError("give the folder to write, which must not exist yet")
    hide_progress_of_libraries()
    begun = perf_counter()
    if to_stock:
        converting.to_stock(source, target)
    else:
        converting.convert(source, target, format)
    nbytes = sum(path.stat().st_size for path in target.iterdir())
    seconds = perf_counter() - begun
    out.print(
        f"{target}: {nbytes / 1e9:.2f} GB in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s)", highlight=False
    )
    if not to_stock:
        out.print(f"experts are in {EXPERTS}; load with moebius.from_pretrained({str(target)!r})", highlight=False)
