"""Error of quantised checkpoints, ours beside transformers' dequantised load, for each architecture of the tests' zoo.

    python -m benchmarks.quantized_checkpoints [NAME ...]

Every model is tiny and random, quantised to FP8 with 32 x 32 blocks (gpt-oss: MXFP4) and loaded in bf16 both ways.
Errors are ||logits - exact|| / ||exact|| against float64 on the very weights that the checkpoint stands for, over four
prompts, with the float64 model's choice of experts forced on all: a token that bf16 sends to another expert, of which
tiny random models have some, says nothing of arithmetic. "other experts" counts these, over layers and tokens, where
models choose for themselves (ours / transformers'). "same" says whether the weights after unpatching are bit for bit
those that transformers loads; if not, whose are what the format's formula gives. Where a model's own code refuses bf16,
all of it is in fp32 ("in fp32"); where it refuses float64, fp32 is called exact.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin.quantized_checkpoints import write, write_mxfp4, write_plain

SEEDS = (1, 2, 3, 4)
Routes = list[tuple[torch.Tensor, torch.Tensor]]  # ids and weights of each call of an experts module, in order


class Chooser:
    """Records what the experts modules of a model are told to compute, or tells them something else.

    Args:
        names: of the modules.
        forced: the routes that they get, if not their own.
    """

    def __init__(self, names: list[str], forced: Routes | None = None) -> None:
        self.routes: Routes = []
        self._names, self._forced = names, iter(forced) if forced is not None else None

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block, of this model."""
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._call, with_kwargs=True) for name in self._names
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _call(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        ids = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
        if ids is None:  # rows of hidden states that are scaled already
            return None
        weights = next(tensor for tensor in tensors if tensor.is_floating_point() and tensor.shape == ids.shape)
        self.routes.append((ids, weights))
        if self._forced is None:
            return None
        other_ids, other_weights = next(self._forced)
        swap = {id(ids): other_ids.to(ids.dtype), id(weights): other_weights.to(weights.dtype)}
        return tuple(swap.get(id(v), v) for v in args), {name: swap.get(id(v), v) for name, v in kwargs.items()}


@torch.no_grad()
def _logits(model: PreTrainedModel, chooser: Chooser) -> torch.Tensor:
    logits = []
    with chooser.on(model):
        for seed in SEEDS:
            torch.manual_seed(seed)  # some draw random numbers
            logits.append(model(**zoo.inputs(model, seed=seed)).logits.double())
    return torch.stack(logits)


def _exact(model: PreTrainedModel, names: list[str]) -> tuple[torch.Tensor, Routes]:
    """Logits and routes in float64, or in fp32 where the model's own code mixes the two."""
    model.set_experts_implementation("eager")
    try:
        return _logits(model.double(), chooser := Chooser(names)), chooser.routes
    except RuntimeError:
        return _logits(model.float(), chooser := Chooser(names)), chooser.routes


def _error(model: PreTrainedModel, names: list[str], exact: torch.Tensor, routes: Routes) -> tuple[str, int]:
    """The error with the exact model's routes, and how many tokens the model sends to other experts."""
    own = Chooser(names)
    _logits(model, own)
    error = ((_logits(model, Chooser(names, routes)) - exact).norm() / exact.norm()).item()
    pairs = zip(own.routes, routes, strict=True)
    return f"{error:.2e}", sum(int((a.sort().values != b.sort().values).any(-1).sum()) for (a, _), (b, _) in pairs)


def measure(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """One row of the table."""
    if name == "gpt_oss":
        write_mxfp4(folder)
    else:
        write(name, folder, "fp8")
    model, wide = (moebius.from_pretrained(str(folder), device="cpu", dtype=d) for d in (dtype, torch.float32))
    layers = {path: module._moebius for path, module in model.named_modules() if "_moebius" in module.__dict__}
    names, formats = list(layers), sorted({layer.held.layout.format for layer in layers.values()})  # type: ignore[union-attr]
    moebius.unpatch(wide)
    exact, routes = _exact(wide, names)
    ours, other = _error(model, names, exact, routes)
    moebius.unpatch(model)
    stock, refusal = _attempt(lambda: type(zoo.build(name)).from_pretrained(folder, dtype=dtype))
    if stock is not None and dtype == torch.float32:
        stock.float()  # some is left in bf16
    start = f"| {name} | {', '.join(formats)}{'' if dtype == torch.bfloat16 else ' in fp32'} | {ours} |"
    if stock is None:
        return f"{start} cannot load it ({refusal}) | {other} / - | - |"
    theirs, their_other = _error(stock, names, exact, routes)
    same = "yes" if _same(model, stock) else "NO"
    if same == "NO":
        write_plain(folder, folder / "plain")
        right = _same(model, type(stock).from_pretrained(folder / "plain", dtype=dtype))
        same = "no: transformers' are not what the format's formula gives" if right else "NO"
    return f"{start} {theirs} | {other} / {their_other} | {same} |"


def _same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def _attempt(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel | None, str]:
    try:
        return load(), ""
    except (ValueError, RuntimeError) as error:
        return None, str(error).splitlines()[0][:60]


def main(names: list[str]) -> None:
    """Print the table."""
    print("| architecture | format | error | transformers' | other experts | same |\n|---|---|---|---|---|---|")
    for name in names or list(zoo.ENTRIES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = _attempt(lambda name=name, folder=Path(folder): measure(name, folder))  # type: ignore[misc]
                print(row[0] or measure(name, Path(folder), torch.float32), flush=True)
            except Exception as error:  # noqa: BLE001 (reported)
                print(f"| {name} | - | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
