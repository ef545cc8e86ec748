"""Dense layers beside experts on the CPU: ours for a few rows, torch's for all else, and torch's again afterwards."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moebius
from moebius.cpu_experts import linear
from moebius.hf_plugin.running.linears import HostLinear
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt, trained

_ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("dense_kernels")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that came to our kernel."""
    seen, multiply = list[int](), linear.multiply

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        seen.append(x.numel() // weight.shape[1])
        return multiply(x, weight, bias)

    monkeypatch.setattr(linear, "multiply", counted)
    return seen


def _linears(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_uses_the_kernel_and_a_prompt_does_not(dtype: torch.dtype, calls: list[int]) -> None:
    """Bug: the kernel is not reached, changes the text, or computes a prompt more slowly than torch."""
    model = trained(dtype)
    ids = prompt(model, batch=1, length=40)
    want, classes = greedy(model, ids), _linears(model)
    assert not calls
    with patched(model, device="cpu"):
        assert greedy(model, ids) == want
        assert set(_linears(model)) == {HostLinear}
        assert calls
        assert max(calls) == 1
        del calls[:]
        logits(model, ids)
        assert set(calls) <= {1}  # the head, which is asked for the last token alone
    assert _linears(model) == classes


def test_other_devices_leave_dense_layers_alone(calls: list[int]) -> None:
    """Bug: a model whose dense layers belong on a GPU has them changed."""
    model = trained()
    with patched(model, device="emulated", gpu_memory="50%"):
        greedy(model, prompt(model))
        assert HostLinear not in _linears(model)
    assert not calls


def test_training_autocast_and_other_dtypes_are_torchs(calls: list[int]) -> None:
    """Bug: a gradient is lost without a word; autocast or `to` is ignored, or meets a kernel for another dtype."""
    dense = nn.Linear(64, 32)
    dense.__class__ = HostLinear
    x = torch.randn(2, 64)
    dense(x).sum().backward()
    assert dense.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert dense(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert dense.double()(x.double()).dtype == torch.float64
        with pytest.raises(RuntimeError, match="dtype"):
            dense(x)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(dense.float()(x), nn.functional.linear(x, dense.weight, dense.bias))
    assert calls == [2]


def test_a_copy_of_a_patched_model_is_unpatched_alone() -> None:
    """Bug: unpatching one of two models takes the other's layers away, or leaves its own."""
    model = trained()
    ids = prompt(model, batch=1)
    want = logits(model, ids)
    with patched(model, device="cpu"):
        twin = copy.deepcopy(model)
        moebius.unpatch(twin)
        assert HostLinear not in _linears(twin)
        assert set(_linears(model)) == {HostLinear}
        assert_close(logits(twin, ids), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_too(run_python: Callable[..., object]) -> None:
    """Bug: the child waits for threads of OpenMP that live in the parent only, as torch does with more than one."""
    run_python(
        """
import os, signal, torch
from moebius.hf_plugin.running.linears import HostLinear
signal.alarm(120)
torch.set_num_threads(2)
dense, x = HostLinear(64, 32), torch.ones(2, 64)
with torch.no_grad():
    want = dense(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(dense(x), want) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
        cwd=_ROOT,
        path=(_ROOT,),
    )
