"""What other tools do with a patched model: it works, or raises, and is never silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin.helpers import assert_close, everywhere, experts_modules, logits, patched, prompt, trained

Change = Callable[[PreTrainedModel], Callable[[torch.Tensor], object] | None]


def assigned(model: PreTrainedModel) -> None:
    experts_modules(model)[1].gate_up_proj = nn.Parameter(torch.zeros(8, 64, 64))


def offloaded(model: PreTrainedModel) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def called_with_others(model: PreTrainedModel) -> Callable[[torch.Tensor], object]:
    others = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "experts" in name}
    return lambda ids: torch.func.functional_call(model, others, (ids,))


@everywhere
@pytest.mark.parametrize("change", [assigned, offloaded, called_with_others], ids=lambda change: change.__name__)
def test_weights_that_are_given_to_patched_experts(change: Change, options: dict[str, object]) -> None:
    """Bug: they are ignored, and the model computes with its own."""
    model = zoo.build("qwen3_moe")
    with patched(model, **options):
        call = change(model) or model
        with pytest.raises(RuntimeError, match=r"experts of 'model\.layers\.[01]\.mlp\.experts' were given .* unpatch"):
            call(prompt(model))


class Logits(nn.Module):
    """A model as tracers like it: tensors in, one tensor out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False, return_dict=False)[0]


@everywhere
@torch.no_grad()
@pytest.mark.usefixtures("dense_kernels")
@pytest.mark.filterwarnings("ignore")
def test_traced(options: dict[str, object]) -> None:
    """Bug: what experts, or dense layers of ours, gave for the example is recorded as a constant."""
    model = trained()
    first, second = prompt(model, 1, 4), prompt(model, 1, 4).flip(1)
    expected = logits(model, second)
    with patched(model, **options):
        traced = torch.jit.trace(Logits(model), (first,), check_trace=False)
        assert_close(traced(second), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_exported_and_then_unpatched() -> None:
    """Bug: an error that names a number, where the experts of a graph are gone."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1, 6)
    expected = logits(model, ids.flip(1))
    moebius.patch(model, device="cpu")
    exported = torch.export.export(Logits(model), (ids,), strict=True).module()
    assert_close(exported(ids.flip(1)), expected)
    moebius.unpatch(model)
    del model
    with pytest.raises(RuntimeError, match=r"model whose experts this graph calls was dropped or unpatched: keep it"):
        exported(ids)
