"""What the tests of patched models share: placements, tiny models and exact comparisons with stock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moebius
from tests import zoo

TRAINED = Path(__file__).parents[1] / "data" / "tiny_moe"

EMULATED: dict[str, Any] = {"device": "emulated", "gpu_memory": 0.5, "prefetch": True}
PLACEMENTS: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "emulated": EMULATED}

# Arguments of generate that make every sequence 8 new tokens long, whatever tokens a random model chooses.
EIGHT: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

everywhere = pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS.keys())


@contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[PreTrainedModel]:
    """The model patched within the block, and unpatched after it."""
    moebius.patch(model, **options)
    try:
        yield model
    finally:
        moebius.unpatch(model)


def trained(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The trained tiny model, loaded anew."""
    return AutoModelForCausalLM.from_pretrained(TRAINED, dtype=dtype).eval()


@cache
def tokenizer() -> Any:
    """The trained tiny model's tokenizer."""
    return AutoTokenizer.from_pretrained(TRAINED)


def prompt(model: PreTrainedModel, batch: int = 2, length: int = 12) -> Tensor:
    """Random token ids [batch, length]."""
    return zoo.inputs(model, batch, length)["input_ids"]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    """Logits [batch, length, vocabulary] of a forward without gradients."""
    return model(input_ids=ids, **arguments).logits


def greedy(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> list[list[int]]:
    """Prompt and 8 greedy tokens of each row."""
    return model.generate(ids, **(EIGHT | arguments)).tolist()


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal but for float32 rounding: max|d| <= 1e-5 * max|want|, the bound that every placement keeps."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5, f"differs by {error:.1e} of the largest value"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaNs included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The state dict has the same names, in order, and the same bits."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert [name for name in before if not same_bits(before[name], after[name])] == []


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that the block leaves the model as it was: bits, flags, attributes of every module, threads."""
    before, facts, threads = weights(model), _facts(model), set(threading.enumerate())
    yield
    assert_same_weights(model, before)
    assert _facts(model) == facts
    assert set(threading.enumerate()) <= threads


def _facts(model: nn.Module) -> list[Any]:
    parameters = [(name, id(p), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()]
    return [*parameters, *((name, type(m), sorted(vars(m))) for name, m in model.named_modules())]


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules called `experts`, in order."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")]
