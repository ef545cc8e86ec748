"""`moebius trace`: record the routing of a live generate for `moebius replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import moebius
from moebius.hf_plugin.cli.console import hide_progress_of_libraries, out, progress_bar
from moebius.hf_plugin.profile import Profile
from moebius.hf_plugin.tools.recording import recording, save_event_logs, start_event_logs
from moebius.hf_plugin.tools.trace_file import read_trace


def trace(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    prompts: Annotated[list[Path], typer.Option(help="Text file, one prompt a line; its name becomes their subject.")],
    out_file: Annotated[Path, typer.Option("--out", help="The npz file to write.")],
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate from each prompt.")] = 256,
    device: Annotated[str, typer.Option(help="As in moebius.patch.")] = "auto",
    events: Annotated[Path | None, typer.Option(help="Also write what the cache was told and decided.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Also write a profile, for moebius.patch's option.")] = None,
) -> None:
    """Generate from prompts greedily and record which experts every layer chose for every token."""
    texts = [(path.stem, line) for path in prompts for line in path.read_text().splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"no prompts in {', '.join(map(str, prompts))}; write one on each line")
    hide_progress_of_libraries()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = moebius.patch(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), device=device)
    logs = [] if events is None else start_event_logs(loaded)
    tokens = 0
    with progress_bar("trace") as update, recording(loaded) as recorder:
        for number, (group, text) in enumerate(texts):
            update(f"prompt {number + 1} of {len(texts)}", number / len(texts))
            inputs = tokenizer(text, return_tensors="pt").to(loaded.device)
            loaded.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            tokens += recorder.end_sequence(group)
        recorder.save(out_file)
    if events is not None:
        save_event_logs(events, logs)
    if profile is not None:
        Profile.of_trace(read_trace(out_file)).save(profile)
    out.print(f"{tokens} tokens of {len(texts)} prompts: {out_file}", highlight=False)
