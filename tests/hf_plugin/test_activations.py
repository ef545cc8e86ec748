"""Activations recognised by their values, with limits and slopes from the module's own attributes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moebius.hf_plugin.discovery.activations import recognise
from moebius.hf_plugin.discovery.sites import find_sites
from moebius.kernels.experts import Act, Activation
from moebius.kernels.reference import activate
from tests import zoo


class Module(nn.Module):
    """Has scalar attributes, of which some are limits."""

    def __init__(self, **scalars: Any) -> None:
        super().__init__()
        vars(self).update({"num_experts": 8, "hidden_dim": 64, "training_step": 3.0, "name": "x"} | scalars)


def of_pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: function(*rows.chunk(2, dim=-1))


def swiglu_of_gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


GATED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Module, Activation]] = {
    "silu": (lambda g, u: F.silu(g) * u, Module(), Activation(Act.SILU)),
    "gelu": (lambda g, u: F.gelu(g) * u, Module(), Activation(Act.GELU_ERF)),
    "gelu_tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, Module(), Activation(Act.GELU_TANH)),
    "relu": (lambda g, u: F.relu(g) * u, Module(), Activation(Act.RELU)),
    "relu2": (lambda g, u: F.relu(g) ** 2 * u, Module(), Activation(Act.RELU2)),
    "gpt_oss": (
        swiglu_of_gpt_oss,
        Module(limit=7.0, alpha=1.702),
        Activation(Act.SILU, 1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
    ),
    "clamped": (
        lambda g, u: F.silu(g.clamp(max=10.0)) * u.clamp(-10.0, 10.0),
        Module(swiglu_limit=10.0),
        Activation(Act.SILU, gate_max=10.0, up_max=10.0),
    ),
    "clamped-after": (
        lambda g, u: F.silu(g).clamp(max=5.0) * u.clamp(-5.0, 5.0),
        Module(limit=5.0),
        Activation(Act.SILU, act_max=5.0, up_max=5.0),
    ),
    "softcapped": (
        lambda g, u: 6.0 * torch.tanh(g / 6.0) * torch.sigmoid(g) * (9.0 * torch.tanh(u / 9.0)),
        Module(gate_cap=6.0, up_cap=9.0),
        Activation(Act.SOFTCAP_SILU, 1.0, gate_max=6.0, up_max=9.0),
    ),
}


@pytest.mark.parametrize(("function", "module", "expected"), GATED.values(), ids=GATED.keys())
def test_known_formulas(function: Callable[[Tensor, Tensor], Tensor], module: Module, expected: Activation) -> None:
    """Catches formulas or limits that are mixed up, and arguments in the wrong order."""
    found = recognise(of_pair(function), gated=True, module=module)
    assert found == expected
    generator = torch.Generator().manual_seed(5)
    gate, up = torch.randn(2, 1000, generator=generator) * 15
    assert torch.allclose(activate(found, gate, up), function(gate, up), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"), [("relu2", Act.RELU2), ("silu", Act.SILU), ("gelu", Act.GELU_ERF), ("relu", Act.RELU)]
)
def test_ungated_functions_of_transformers(name: str, kind: Act) -> None:
    """Catches an ungated expert that is asked for gates."""
    assert recognise(ACT2FN[name], gated=False, module=Module()) == Activation(kind)


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mish": lambda g, u: F.mish(g) * u,
    "swapped": lambda g, u: F.silu(u) * g,
    "added": lambda g, u: F.silu(g) + u,
    "doubled": lambda g, u: 2 * F.silu(g) * u,
    "a limit that is no attribute": lambda g, u: F.silu(g.clamp(max=3.3)) * u.clamp(-3.3, 3.3),
    "two-sided clamp of the gate": lambda g, u: F.silu(g.clamp(-1.0, 7.0)) * u.clamp(-7.0, 7.0),
    "a slope that is no attribute": lambda g, u: g * torch.sigmoid(1.3 * g) * u,
    "leaky": lambda g, u: F.leaky_relu(g) * u,
    "always nan": lambda g, u: g * float("nan"),
}


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_anything_else_is_not_recognised(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Catches a nearby formula that is taken for the module's, which would then be computed wrongly."""
    assert recognise(of_pair(function), gated=True, module=Module(limit=7.0)) is None


def test_attributes_of_children_count() -> None:
    """Catches limits that an activation module keeps, and not the experts themselves."""
    parent = Module()
    parent.act = Module(limit=7.0, alpha=1.702)
    found = recognise(of_pair(swiglu_of_gpt_oss), gated=True, module=parent)
    assert found == GATED["gpt_oss"][2]


def test_attributes_that_are_no_limits() -> None:
    """Catches NaN, infinity, negative numbers and booleans that are tried as limits."""
    odd = Module(a=float("nan"), b=inf, c=-3.0, d=True, e=0, f=1e30)
    assert recognise(of_pair(lambda g, u: F.silu(g) * u), gated=True, module=odd) == Activation(Act.SILU)


# what the zoo's own code computes, by architecture; others are plain SwiGLU
SPECIAL = {
    "qwen3_moe": Activation(Act.SILU),
    "gemma4": Activation(Act.GELU_TANH),
    "nemotron_h": Activation(Act.RELU2),
    "deepseek_v4": Activation(Act.SILU, gate_max=0.3, up_max=0.3),
    "gpt_oss": Activation(Act.SILU, 1.702, gate_max=0.3, up_max=0.3, up_shift=1.0),
    "inkling2": Activation(Act.SOFTCAP_SILU, 1.0, gate_max=0.5, up_max=0.5),
}


@pytest.mark.parametrize(("name", "expected"), SPECIAL.items())
def test_architectures_get_compiled_kernels(name: str, expected: Activation) -> None:
    """Catches an architecture that falls back to torch code of its own, which is exact and slow."""
    if name in zoo.missing():
        pytest.skip(f"the installed transformers has no {name}")
    for site in find_sites(zoo.build(name)):
        if name == "gpt_oss":  # a constant of its code until transformers 5.18 or so
            expected = expected._replace(gate_max=site.module.limit, up_max=site.module.limit)
        assert site.spec.activation == expected
        assert site.spec.custom is None
