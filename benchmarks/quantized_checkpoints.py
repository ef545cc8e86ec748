"""Error of quantised checkpoints, ours beside transformers' dequantised load, for each architecture of the tests' zoo.

    python -m benchmarks.quantized_checkpoints [NAME ...]

Every model is tiny and random, quantised to FP8 with 32 x 32 blocks (gpt-oss: MXFP4) and loaded in bf16 both ways.
Errors are ||logits - exact|| / ||exact|| against float64 on the very weights that the checkpoint stands for. "same"
says whether the weights after unpatching are bit for bit those that transformers loads.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin.helpers import experts_modules
from tests.hf_plugin.quantized_checkpoints import write, write_mxfp4


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits.double()


def measure(name: str, folder: Path) -> str:
    """One row of the table."""
    if name == "gpt_oss":
        write_mxfp4(folder)
    else:
        write(name, folder, "fp8")
    kind = type(zoo.build(name))
    stock = kind.from_pretrained(folder)
    model, wide = (moebius.from_pretrained(str(folder), device="cpu", dtype=dtype) for dtype in (None, torch.float32))
    formats = {module._moebius.held.layout.format for module in experts_modules(model)}  # type: ignore[union-attr]
    inputs = zoo.inputs(stock)
    moebius.unpatch(wide)
    exact = _logits(_eager(wide.double()), inputs)
    theirs, ours = (((_logits(m, inputs) - exact).norm() / exact.norm()).item() for m in (stock, model))
    moebius.unpatch(model)
    same = all(torch.equal(t, stock.state_dict()[key]) for key, t in model.state_dict().items())
    return f"| {name} | {', '.join(sorted(formats))} | {ours:.2e} | {theirs:.2e} | {'yes' if same else 'NO'} |"


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    model.set_experts_implementation("eager")
    return model


def main(names: list[str]) -> None:
    """Print the table."""
    print("| architecture | format | error | transformers' | same |\n|---|---|---|---|---|")
    for name in names or list(zoo.ENTRIES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(measure(name, Path(folder)), flush=True)
            except Exception as error:  # noqa: BLE001 (reported)
                print(f"| {name} | - | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
