"""Random layers and routings for the tests of this folder, with their float64 reference."""

from __future__ import annotations

import numpy as np
import torch

from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import Routes, build_routes


def random_store(spec: ExpertSpec, format: str, experts: int, seed: int = 0) -> ExpertStore:
    """Weights that keep outputs of the order of 1."""
    store = ExpertStore.empty(spec, RecordLayout.of(spec, format), experts)
    generator = torch.Generator().manual_seed(seed)
    for expert in range(experts):
        for part in store.weights(expert):
            if part is not None:
                scale = part.shape[-1] ** -0.5 if part.ndim == 2 else 0.5
                part.copy_(torch.randn(part.shape, generator=generator) * scale)
    return store


def random_routes(tokens: int, k: int, experts: int, seed: int = 0) -> Routes:
    """Ids with sentinels and duplicates of an expert for one token, and some zero weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, experts + 1, (tokens, k))
    weights = rng.standard_normal((tokens, k)).astype(np.float32)
    weights[rng.random((tokens, k)) < 0.1] = 0
    return build_routes(ids, weights, experts)


def expected(store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> torch.Tensor:
    """What `run` must add to `out`, in float64."""
    result = out.double()
    reference.moe_forward(store.spec, [store.weights(int(e)) for e in routes.experts], x, routes, result)
    return result
