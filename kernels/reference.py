"""The mathematics in plain torch: what every other kernel is compared with, at any precision and on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moebius.kernels.experts import Act, Activation, ExpertSpec, ExpertWeights
from moebius.kernels.routes import Routes


def activate(activation: Activation, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """Apply a recognised activation element-wise; `up` is None for ungated experts."""
    kind, alpha, gate_max, act_max, up_max, up_shift = activation
    if kind == Act.SOFTCAP_SILU:
        first = gate_max * torch.tanh(gate / gate_max) * torch.sigmoid(alpha * gate)
        return first if up is None else first * (up_max * torch.tanh(up / up_max))
    first = _function(kind, alpha, gate.clamp(max=gate_max)).clamp(max=act_max)
    return first if up is None else first * (up.clamp(-up_max, up_max) + up_shift)


def _function(kind: Act, alpha: float, x: torch.Tensor) -> torch.Tensor:
    match kind:
        case Act.SILU:
            return x * torch.sigmoid(alpha * x)
        case Act.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Act.GELU_ERF:
            return F.gelu(x)
        case Act.RELU:
            return F.relu(x)
        case Act.RELU2:
            return F.relu(x).square()
    raise ValueError(f"activation {kind!r} has no formula; a custom one is called through ExpertSpec.custom")


def gate_up(spec: ExpertSpec, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activated intermediate [n, I] from pre-activations [n, I], recognised or custom."""
    if spec.custom is not None:
        return spec.custom(up if gate is None else torch.cat([gate, up], dim=-1))
    return activate(spec.activation, up if gate is None else gate, None if gate is None else up)


def expert_forward(spec: ExpertSpec, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """One expert on x [n, H], unweighted, computed in x's dtype."""
    w = ExpertWeights(*(None if part is None else part.to(x.dtype) for part in weights))  # type: ignore[arg-type]
    gate = None if w.gate is None else F.linear(x, w.gate, w.gate_bias)
    y = F.linear(gate_up(spec, gate, F.linear(x, w.up, w.up_bias)), w.down, w.down_bias)
    return y if spec.post_norm is None else spec.post_norm(y)


def moe_forward(
    spec: ExpertSpec, weights: Sequence[ExpertWeights], x: torch.Tensor, routes: Routes, out: torch.Tensor
) -> None:
    """Add the routed experts' weighted outputs for x [T, H] to out [T, H], computed in out's dtype.

    Args:
        weights: of the active experts, in the order of ``routes.experts``.
    """
    for i, expert in enumerate(weights):
        pairs = slice(int(routes.offsets[i]), int(routes.offsets[i + 1]))
        tokens = torch.from_numpy(routes.tokens[pairs]).to(x.device, torch.int64)
        scale = torch.from_numpy(routes.weights[pairs]).to(out.device, out.dtype)
        y = expert_forward(spec, expert, x[tokens].to(out.dtype))
        out.index_add_(0, tokens, y.to(out.dtype) * scale[:, None])
