"""`moebius warmup`: compile the CPU kernels now instead of at the first call."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import AutoConfig

from moebius.hf_plugin.cli.console import out, print_json, progress_bar
from moebius.hf_plugin.warmup import warm_up
from moebius.kernels.formats import FLOATS, FORMATS


def warmup(
    model: Annotated[
        str | None, typer.Argument(help="Folder, hub name or config.json: only what its dtype needs.")
    ] = None,
    formats: Annotated[
        str | None, typer.Option("--expert-format", "--format", help=f"Instead of the dtype's: {', '.join(FORMATS)}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compile the CPU kernels into the cache folder; the next first call takes under a second."""
    chosen = [name.strip() for name in formats.split(",")] if formats else [_native(model)] if model else list(FORMATS)
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise ValueError(f"expert format {unknown[0]!r} is unknown; choose of {', '.join(FORMATS)}")
    with progress_bar("compiling") as update:
        rows = list(warm_up(chosen, update))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    for row in rows:
        out.print(f"{row.kernels:>6}  {row.seconds:6.1f} s", highlight=False)


def _native(model: str) -> str:
    config: Any = AutoConfig.from_pretrained(model)
    dtype = config.get_text_config().dtype or config.dtype
    return next((name for name, known in FLOATS.items() if known == dtype), "fp32")
