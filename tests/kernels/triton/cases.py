"""A random layer in slots, its routing, and the answer in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moebius.kernels.experts import Act, Activation, ExpertSpec, RecordLayout
from moebius.kernels.packing import pack, unpack
from moebius.kernels.reference import moe_forward
from moebius.kernels.routes import Routes, build_routes

ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(),
    "gpt_oss": Activation(alpha=1.702, gate_max=1.0, up_max=1.0, up_shift=1.0),
    "silu_act_max": Activation(act_max=0.5),
    "gelu_tanh": Activation(Act.GELU_TANH),
    "gelu_erf": Activation(Act.GELU_ERF),
    "relu": Activation(Act.RELU, up_max=0.5),
    "relu2": Activation(Act.RELU2, act_max=2.0),
    "softcap": Activation(Act.SOFTCAP_SILU, gate_max=2.0, up_max=1.5),
}


class Case(NamedTuple):
    spec: ExpertSpec
    layout: RecordLayout
    pool: torch.Tensor  # uint8 [S, nbytes], NaN in the slots that nobody uses (scales, where quantised)
    x: torch.Tensor  # [T, H]
    routes: Routes
    slots: np.ndarray  # int32 [A]

    def expected(self) -> torch.Tensor:
        """float64 [T, H]."""
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        weights = [unpack(self.layout, self.layout.stored(self.pool[slot])) for slot in self.slots]
        moe_forward(self.spec, weights, self.x, self.routes, out)
        return out

    def to(self, device: str) -> Case:
        """The same with pool and inputs on a device."""
        return self._replace(pool=self.pool.to(device), x=self.x.to(device))


def make_case(
    ids: np.ndarray,
    hidden: int = 48,
    intermediate: int = 40,
    num_experts: int = 8,
    gated: bool = True,
    biased: bool = True,
    activation: Activation = ACTIVATIONS["silu"],
    format: str = "fp32",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """One layer step; `dtype` of x is the records' where not given."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    spec = ExpertSpec(hidden, intermediate, gated, biased, activation)
    layout = RecordLayout.of(spec, format)
    routes = build_routes(ids, rng.uniform(-1, 1, ids.shape).astype(np.float32), num_experts)
    slots = rng.permutation(num_experts + 3)[: len(routes.experts)].astype(np.int32)
    pool = torch.full((num_experts + 3, layout.nbytes), 255, dtype=torch.uint8)
    for slot in slots.tolist():
        weights = {name: torch.randn(shape, generator=generator) for name, shape in layout.shapes().items()}
        pack(layout, pool[slot], {name: weight * 2 / hidden**0.5 for name, weight in weights.items()})
    x = torch.randn(len(ids), hidden, generator=generator).to(dtype or layout.dtype)
    return Case(spec, layout, pool, x, routes, slots)


def random_ids(tokens: int, top_k: int, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    """Distinct experts for each token, int64 [T, k]."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.cpu().double() - expected).abs().max() / expected.abs().max())
