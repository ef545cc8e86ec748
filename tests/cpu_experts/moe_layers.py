"""Random layers and routings for the tests of this folder, with their float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.experts import Activation, ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.formats import GROUP
from moebius.kernels.numba.groups import LIMITS
from moebius.kernels.numba.quantized import FEW
from moebius.kernels.packing import pack
from moebius.kernels.routes import Routes, build_routes


def draw_spec(data: st.DataObject, size: st.SearchStrategy[int], activations: Sequence[Activation]) -> ExpertSpec:
    """What experts compute: any sides, with a gate and biases or without."""
    return ExpertSpec(
        hidden=data.draw(size, "hidden"), intermediate=data.draw(size, "intermediate"), gated=data.draw(st.booleans()),
        biased=data.draw(st.booleans()), activation=data.draw(st.sampled_from(activations)),
    )  # fmt: skip


def random_store(spec: ExpertSpec, format: str, experts: int, seed: int = 0) -> ExpertStore:
    """Weights that keep outputs of the order of 1."""
    store = ExpertStore.empty(spec, RecordLayout.of(spec, format), experts)
    generator = torch.Generator().manual_seed(seed)
    for expert in range(experts):
        for name, shape in store.layout.shapes().items():
            scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.5
            pack(store.layout, store.records[expert], {name: torch.randn(shape, generator=generator) * scale})
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


def round_to_groups(x: torch.Tensor, limit: int) -> torch.Tensor:
    """x [..., n] in codes of -limit..limit, each group of 32 with a scale of its own; rounded in fp32, float64."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(peak > 0, (groups * (limit / peak)).round(), 0.0)
    return (codes.double() * (peak / limit).double()).flatten(-2)[..., : x.shape[-1]]


def expected_quantized(
    store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `run` must add to `out`, activations rounded as the kernels do, in float64; and the size of what is summed.

    Those of experts with many pairs are not rounded to groups, nor those in fp32 beside mxfp4. A code of the
    intermediate that lies between two numbers may be rounded to either, so results differ by up to 1 / limit of that
    size.
    """
    limit = LIMITS[store.layout.format]
    few = FEW[store.layout.format]
    if store.layout.format == "mxfp4" and x.dtype == torch.float32:
        few = 0
    return sum_up(
        store, x, routes, out, lambda values: round_to_groups(values, limit) if len(values) <= few else values.double()
    )


def size_of_sums(store: ExpertStore, x: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Sums of the magnitudes of everything that is added to an output [T, H], in float64."""
    return sum_up(store, x, routes, torch.zeros(x.shape), torch.Tensor.double)[1]


def size_of_bf16(store: ExpertStore, x: torch.Tensor, routes: Routes) -> torch.Tensor:
    """How far outputs [T, H] may be off where experts compute in bf16 (many tokens, in bf16); else zeros.

    Rounding moves every product by up to 2 ** -9 of itself, independently: a sum by 4 times the root of the squares of
    that (seven standard deviations), and the activation by what this makes of it at most.
    """
    size = torch.zeros(x.shape, dtype=torch.float64)
    if x.dtype != torch.bfloat16:
        return size

    def blur(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(values.square(), weight.square()).sqrt() / 128

    for i, expert in enumerate(routes.experts):
        pairs = slice(int(routes.offsets[i]), int(routes.offsets[i + 1]))
        tokens, scale = torch.from_numpy(routes.tokens[pairs]).long(), torch.from_numpy(routes.weights[pairs])[:, None]
        w = ExpertWeights(*(None if part is None else part.double() for part in store.weights(int(expert))))
        inputs = x[tokens].double()
        gate = None if w.gate is None else F.linear(inputs, w.gate, w.gate_bias)
        up, gate_blur = F.linear(inputs, w.up, w.up_bias), 0.0 if w.gate is None else blur(inputs, w.gate)
        inner, moved = reference.gate_up(store.spec, gate, up), torch.zeros(len(inputs), store.spec.intermediate)
        for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            shifted = None if gate is None else gate + a * gate_blur
            there = reference.gate_up(store.spec, shifted, up + b * blur(inputs, w.up))
            moved = torch.maximum(moved.double(), (there - inner).abs())
        moved = F.linear((moved + inner.abs() / 128).square(), w.down.square()).sqrt()
        size.index_add_(0, tokens, scale.abs() * (moved + blur(inner, w.down)))
    return size


def sum_up(
    store: ExpertStore, x: torch.Tensor, routes: Routes, out: torch.Tensor, rounded: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    spec, result, size = store.spec, out.double(), torch.zeros(out.shape, dtype=torch.float64)
    for i, expert in enumerate(routes.experts):
        pairs = slice(int(routes.offsets[i]), int(routes.offsets[i + 1]))
        tokens, scale = torch.from_numpy(routes.tokens[pairs]).long(), torch.from_numpy(routes.weights[pairs])[:, None]
        w = ExpertWeights(*(None if part is None else part.double() for part in store.weights(int(expert))))
        inputs = rounded(x[tokens])
        gate = None if w.gate is None else F.linear(inputs, w.gate, w.gate_bias)
        inner = rounded(reference.gate_up(spec, gate, F.linear(inputs, w.up, w.up_bias)))
        result.index_add_(0, tokens, scale * F.linear(inner, w.down, w.down_bias))
        size.index_add_(0, tokens, scale.abs() * F.linear(inner.abs(), w.down.abs()))
    return result, size
