"""`moebius demo`: stock and patched side by side, on a small trained model or on any other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moebius
from moebius.gpu_cache.device import default_device
from moebius.hf_plugin.cli.console import Update, hide_progress_of_libraries, out, progress_bar
from moebius.hf_plugin.tools.generation import (
    TIE_MARGIN,
    Agreement,
    Generation,
    compare_with_stock,
    generate_greedily,
    require_model,
)

PROMPT = '''import os
import sys


class Cache:
    """A mapping that forgets the keys that were not used for the longest time."""

    def __init__(self, maxsize):
        self.maxsize = maxsize
        self._data = {}

    def get(self, key, default=None):
'''
WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What the demo found out."""

    options: dict[str, Any]
    stock: Generation
    patched: Generation
    agreement: Agreement
    statistics: moebius.Stats
    weights_equal: bool


def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub name. Default: the checkout's small model.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 120,
) -> None:
    """Continue a text with stock transformers and with Moebius: the same text, two speeds, and where experts ran."""
    path = require_model(model)
    hide_progress_of_libraries()
    tokenizer = AutoTokenizer.from_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with progress_bar("demo") as update:
        found = _compare(loaded, prompt, new_tokens, update)
    _show(found, str(tokenizer.decode(found.patched.tokens)))
    if not (found.agreement.same or found.agreement.tie) or not found.weights_equal:
        raise typer.Exit(1)


def _compare(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, update: Update) -> _Comparison:
    found = default_device()
    options = {"device": "emulated" if found == "cpu" else found, "gpu_memory": 0.25}
    before = copy.deepcopy(model.state_dict())
    update("stock is generating", 0.0)
    stock = _timed(model, prompt, new_tokens)
    update("patching", 0.4)
    moebius.patch(model, **options)
    update("Moebius is generating (the first run on a machine compiles kernels)", 0.5)
    patched = _timed(model, prompt, new_tokens)
    statistics = moebius.stats(model)
    moebius.unpatch(model)
    agreement = compare_with_stock(model, prompt, stock.tokens, patched.tokens)
    return _Comparison(options, stock, patched, agreement, statistics, _equal_bytes(before, model.state_dict()))


def _timed(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Generation:
    """Generate after a short warm-up, whose counters are not kept."""
    generate_greedily(model, prompt, min(WARMUP_TOKENS, new_tokens))
    if moebius.is_patched(model):
        moebius.reset_stats(model)
    return generate_greedily(model, prompt, new_tokens)


def _equal_bytes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, devices and bits."""
    return before.keys() == after.keys() and all(_same(tensor, after[name]) for name, tensor in before.items())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _show(found: _Comparison, text: str) -> None:
    call = ", ".join(f"{name}={value!r}" for name, value in found.options.items())
    out.print(Syntax(f"moebius.patch(model, {call})", "python", background_color="default"))
    out.print(Panel(Text.assemble((PROMPT, "dim"), text), title="prompt and continuation", title_align="left"))
    out.print(_verdict(found.agreement, len(found.stock.tokens)))
    slow, fast = found.stock, found.patched
    out.print(f"tokens/s  stock {slow.decode_tok_s:.1f}, Moebius {fast.decode_tok_s:.1f}", highlight=False)
    out.print(f"first token  stock {slow.first_token_s:.3f} s, Moebius {fast.first_token_s:.3f} s", highlight=False)
    out.print("[dim]one run of each, not a measurement: for that there is `moebius bench generate`[/]", highlight=False)
    typer.echo(str(found.statistics))
    if found.weights_equal:
        out.print("[green]Unpatched: all weights are equal to the original, byte for byte.[/]", highlight=False)
    else:
        out.print("[bold red]Unpatched, but weights differ from the original: this is a bug.[/]", highlight=False)


def _verdict(agreement: Agreement, tokens: int) -> str:
    if agreement.same:
        return f"[green]The text equals stock's: {tokens} of {tokens} tokens.[/]"
    place = f"at token {agreement.first_difference}, where stock's two best logits are {agreement.margin:.2e} apart"
    if agreement.tie:
        return f"[yellow]The text differs from stock's {place}: a tie, under {TIE_MARGIN:.0e}.[/]"
    return f"[bold red]The text differs from stock's {place}: this is a bug.[/]"
