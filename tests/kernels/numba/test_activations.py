"""Activations of the kernels against the reference, with torch's treatment of NaN and infinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebius.kernels import reference
from moebius.kernels.experts import Act, Activation
from moebius.kernels.numba.activations import first_factor, second_factor
from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import address_of
from moebius.kernels.numba.simd import LANES, load, mul, splat, store

FORMS = [
    Activation(),
    Activation(Act.SILU, alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
    Activation(Act.SILU, act_max=2.5),
    Activation(Act.GELU_TANH),
    Activation(Act.GELU_ERF, gate_max=3.0),
    Activation(Act.RELU, act_max=4.0),
    Activation(Act.RELU2),
    Activation(Act.SOFTCAP_SILU, alpha=1.2, gate_max=10.0, up_max=5.0),
]


@entry("void(int64, float32[::1], float32[::1], float32[::1], boolean, float32[::1])")
def _apply(kind, limits, gate, up, gated, out):  # type: ignore[no-untyped-def]
    for i in range(0, len(gate), LANES):
        g, u = load(address_of(gate) + 4 * i, limits[0]), load(address_of(up) + 4 * i, limits[0])
        value = first_factor(kind, splat(limits[0]), splat(limits[1]), splat(limits[2]), g)
        if gated:
            value = mul(value, second_factor(kind, splat(limits[3]), splat(limits[4]), u))
        store(address_of(out) + 4 * i, value)


def _ours(form: Activation, gate: torch.Tensor, up: torch.Tensor, gated: bool) -> torch.Tensor:
    pad = (0, -len(gate) % LANES)
    gate, up = (torch.nn.functional.pad(part, pad) for part in (gate, up))
    out, limits = torch.empty_like(gate), np.array(form[1:], np.float32)
    _apply(int(form.kind), limits, gate.numpy(), up.numpy(), gated, out.numpy())
    return out[: len(out) - pad[1]]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind.name}-{form.gate_max}-{form.act_max}")
def test_values_equal_the_float64_reference(form: Activation, gated: bool) -> None:
    """Bug: a wrong formula, limit or shift; a library function with less than fp32 precision."""
    gate = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-44, 1, 200), -torch.logspace(-44, 1, 200)])
    up = torch.linspace(-11, 11, len(gate))
    expected = reference.activate(form, gate.double(), up.double() if gated else None)
    # 1 + erf and 1 + tanh cancel for negative arguments: half an ulp of 1, times both factors.
    torch.testing.assert_close(_ours(form, gate, up, gated).double(), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind.name}-{form.gate_max}-{form.act_max}")
def test_nan_and_infinity_go_where_torch_lets_them_go(form: Activation, gated: bool) -> None:
    """Bug: min, max or a fast-math flag swallows NaN, so a broken model looks healthy."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-42])
    gate, up = (part.reshape(-1).contiguous() for part in torch.meshgrid(special, special, indexing="ij"))
    expected = reference.activate(form, gate, up if gated else None)
    torch.testing.assert_close(_ours(form, gate, up, gated), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
