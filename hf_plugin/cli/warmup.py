"""`moebius warmup`: compile the CPU kernels now instead of at the first call, and tune the GPU's."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from moebius.gpu_cache.device import default_device
from moebius.hf_plugin.cli.console import out, print_json, progress_bar
from moebius.hf_plugin.tools.warmup import Tuned, tune_tiles, warm_up
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
    """Compile the CPU kernels into the cache folder; the next first call takes under a second.

    With a MODEL and a GPU, Triton's kernels are tuned for its experts too, once for each format and size.
    """
    chosen = [name.strip() for name in formats.split(",")] if formats else [_native(model)] if model else list(FORMATS)
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise ValueError(f"expert format {unknown[0]!r} is unknown; choose of {', '.join(FORMATS)}")
    with progress_bar("compiling") as update:
        rows = list(warm_up(chosen, update))
    config, device = AutoConfig.from_pretrained(model) if model else None, default_device()
    tuned: list[Tuned] = []
    if config is not None and device != "cpu":
        with progress_bar("tuning") as update:
            for done, format in enumerate(chosen):
                update(format, done / len(chosen))
                tuned += tune_tiles(config, format, torch.device(device))
    if as_json:
        print_json([row._asdict() for row in rows] + [row._asdict() for row in tuned])
        return
    for row in rows:
        out.print(f"{row.kernels:>6}  {row.seconds:6.1f} s", highlight=False)
    for best in tuned:
        sizes = ", ".join(f"{name} {size}" for name, size in best.tile.items())
        out.print(f"{best.kernels}: {sizes}, {best.us:.1f} us", highlight=False)


def _native(model: str) -> str:
    config: Any = AutoConfig.from_pretrained(model)
    dtype = config.get_text_config().dtype or config.dtype
    return next((name for name, known in FLOATS.items() if known == dtype), "fp32")
