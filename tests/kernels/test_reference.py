"""The torch reference against formulas written out by hand in float64."""

from __future__ import annotations

from math import erf, exp, inf, isnan, nan, sqrt, tanh

import numpy as np
import pytest
import torch

from moebius.kernels.experts import Act, Activation, ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.packing import unpack
from moebius.kernels.reference import activate, expert_forward, gate_up, moe_forward
from moebius.kernels.routes import build_routes

POINTS = [-30.0, -3.0, -0.7, -1e-3, 0.0, 1e-3, 0.7, 3.0, 30.0]


def sigmoid(v: float) -> float:
    return 1 / (1 + exp(-v))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (Activation(), lambda g, u: g * sigmoid(g) * u),
        (Activation(Act.GELU_TANH), lambda g, u: 0.5 * g * (1 + tanh(0.7978845608 * (g + 0.044715 * g**3))) * u),
        (Activation(Act.GELU_ERF), lambda g, u: 0.5 * g * (1 + erf(g / sqrt(2))) * u),
        (Activation(Act.RELU), lambda g, u: max(g, 0) * u),
        (Activation(Act.RELU2), lambda g, u: max(g, 0) ** 2 * u),
        (
            Activation(Act.SOFTCAP_SILU, gate_max=5.0, up_max=4.0),
            lambda g, u: 5 * tanh(g / 5) * sigmoid(g) * 4 * tanh(u / 4),
        ),
        (  # gpt-oss: the gate is limited from above only, up from both sides and shifted
            Activation(alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
            lambda g, u: min(g, 7) * sigmoid(1.702 * min(g, 7)) * (min(max(u, -7), 7) + 1),
        ),
        (Activation(act_max=2.0), lambda g, u: min(g * sigmoid(g), 2) * u),  # the limit is on the activated gate
    ],
)
def test_gated_activation_equals_its_formula(activation, formula):
    """A limit on the wrong side or factor, or alpha in the wrong place."""
    for g in POINTS:
        for u in POINTS:
            got = activate(activation, torch.tensor(g, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
            assert got.item() == pytest.approx(formula(g, u), rel=1e-9, abs=1e-9), (g, u)


def test_ungated_activation_leaves_up_shift_out():
    """`up_shift` applied to an expert that has no second factor."""
    got = activate(Activation(Act.RELU2, up_shift=1.0), torch.tensor([-2.0, 3.0]), None)
    assert got.tolist() == [0.0, 9.0]


@pytest.mark.parametrize("kind", [kind for kind in Act if kind != Act.CUSTOM])
def test_nan_passes_through_every_limit(kind):
    """A clamp that turns NaN into its limit would hide a broken model."""
    limits = Activation(kind, gate_max=2.0, act_max=2.0, up_max=2.0)
    assert isnan(activate(limits, torch.tensor(nan), torch.tensor(1.0)).item())
    assert isnan(activate(limits, torch.tensor(1.0), torch.tensor(nan)).item())


def test_custom_kind_without_code_is_refused():
    with pytest.raises(ValueError, match=r"ExpertSpec\.custom"):
        activate(Activation(Act.CUSTOM), torch.ones(1), torch.ones(1))


def test_custom_code_sees_all_gates_then_all_ups():
    spec = ExpertSpec(4, 3, custom=lambda both: both[:, :3] - 10 * both[:, 3:])
    assert gate_up(spec, torch.full((2, 3), 5.0), torch.full((2, 3), 1.0)).tolist() == [[-5.0] * 3] * 2


def random_experts(spec: ExpertSpec, count: int) -> list[ExpertWeights]:
    layout = RecordLayout.of(spec, "fp32")
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(count, layout.nbytes // 4, generator=generator).view(torch.uint8)
    return [unpack(layout, layout.stored(record)) for record in records]


def naive(spec: ExpertSpec, w: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    w = ExpertWeights(*(None if part is None else part.double() for part in w))  # type: ignore[arg-type]
    up = w.up @ x + (0 if w.up_bias is None else w.up_bias)
    if w.gate is None:
        a = torch.relu(up) ** 2
    else:
        gate = w.gate @ x + (0 if w.gate_bias is None else w.gate_bias)
        a = gate * torch.sigmoid(gate) * up
    return w.down @ a + (0 if w.down_bias is None else w.down_bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_routed_experts_equal_a_loop_over_pairs(gated, biased):
    """A transposed matrix, a bias left out or added after the weight, a pair summed into another token."""
    spec = ExpertSpec(5, 7, gated, biased, Activation(Act.SILU if gated else Act.RELU2))
    experts = random_experts(spec, 4)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = np.array([[0, 3], [3, 3], [-1, 4]])  # a duplicate, and a token without any expert
    weights = np.array([[0.25, -2.0], [0.5, 1.5], [9.0, 9.0]], np.float32)
    routes = build_routes(ids, weights, 4)
    out = torch.zeros(3, 5, dtype=torch.float64)
    moe_forward(spec, [experts[e] for e in routes.experts], x, routes, out)
    for t in range(2):
        expected = sum(float(weights[t, k]) * naive(spec, experts[ids[t, k]], x[t]) for k in range(2))
        torch.testing.assert_close(out[t], expected)
    assert (out[2] == 0).all()


def test_post_norm_precedes_the_routing_weight():
    """Normalising after the weight would cancel it."""
    spec = ExpertSpec(5, 7, post_norm=lambda y: y / y.norm(dim=-1, keepdim=True))
    routes = build_routes(np.array([[1]]), np.array([[3.0]], np.float32), 2)
    out = torch.zeros(1, 5)
    moe_forward(spec, random_experts(spec, 2)[1:], torch.ones(1, 5), routes, out)
    assert out.norm().item() == pytest.approx(3.0, rel=1e-6)


def test_result_is_added_to_out():
    spec = ExpertSpec(5, 7)
    routes = build_routes(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)
    once, twice = torch.zeros(1, 5), torch.zeros(1, 5)
    for out in (once, twice, twice):
        moe_forward(spec, random_experts(spec, 1), torch.ones(1, 5), routes, out)
    assert torch.equal(twice, 2 * once)


def test_computation_is_in_the_precision_of_x():
    """bf16 weights with fp32 inputs must not round the intermediate to bf16."""
    spec = ExpertSpec(64, 64)
    layout = RecordLayout.of(spec, "bf16")
    record = (0.1 * torch.randn(layout.nbytes // 2, generator=torch.Generator().manual_seed(0))).bfloat16()
    w = unpack(layout, layout.stored(record.view(torch.uint8)))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expert_forward(spec, w, x)[0].double(), naive(spec, w, x[0].double()), rtol=0, atol=1e-5)


def test_no_limit_is_exactly_no_limit():
    assert Activation().gate_max == inf
    assert activate(Activation(Act.RELU), torch.tensor(inf), None).item() == inf
