"""Experts in the formats of quantised checkpoints: against float64 on the very weights that the codes stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import Act, Activation, ExpertSpec
from moebius.kernels.routes import build_routes

from .moe_layers import draw_spec, expected, random_routes, random_store, size_of_bf16, size_of_sums

FORMATS = [
    "fp8", "mxfp4", "e4m3-3x32-bf16", "e4m3-1x0-fp16", "e4m3-0x0-fp32", "e4m3-32x64-e8m0", "e2m1-1x128-fp32",
    "int4-1x64-fp16", "int4-1x128-bf16-zeros", "int4-1x32-fp32-zeros", "int4-1x0-fp16-zeros", "int8-1x0-bf16",
    "int8-1x128-fp32",
]  # fmt: skip
ACTIVATIONS = [Activation(), Activation(Act.SILU, 1.702, 7.0, up_max=7.0, up_shift=1.0), Activation(Act.GELU_ERF)]
TOLERANCE = 2e-6  # of the magnitudes that are summed, in fp32


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_equals_float64(executors: dict[int, CpuExecutor], data: st.DataObject) -> None:
    """Bug: a scale or zero point of a neighbour; a tail of a row, a block of scales, a panel or a batch of pairs."""
    size = st.integers(1, 70) | st.sampled_from([96, 128, 129, 200, 258, 510, 513, 600])
    spec = draw_spec(data, size, ACTIVATIONS)
    experts = data.draw(st.integers(1, 6), "experts")
    k, tokens = data.draw(st.integers(1, experts), "k"), data.draw(st.integers(0, 20) | st.just(90), "tokens")
    seed, format = data.draw(st.integers(0, 2**16), "seed"), data.draw(st.sampled_from(FORMATS))
    store = random_store(spec, format, experts, seed)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    dtype = data.draw(st.sampled_from(dtypes[:1] if format == "mxfp4" else dtypes))  # others: see test_quantized
    x = torch.randn(tokens, spec.hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    routes, out = random_routes(tokens, k, experts, seed), torch.full((tokens, spec.hidden), 0.25)
    exact = expected(store, x, routes, out)
    bound = TOLERANCE * size_of_sums(store, x, routes) + size_of_bf16(store, x, routes) + 1e-5
    executors[data.draw(st.sampled_from(sorted(executors)), "threads")].run(store, x, routes, out)
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_threads_and_order_change_no_bit(executors: dict[int, CpuExecutor], format: str, tokens: int) -> None:
    """Bug: a sum whose order depends on who computes it, or on its neighbours in a tile."""
    store = random_store(ExpertSpec(160, 96), format, 2)
    x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    routes = build_routes(np.tile([0, 1], (tokens, 1)), np.full((tokens, 2), 0.5, np.float32), 2)
    results = []
    for threads, order in ((1, slice(None)), (5, slice(None)), (2, slice(None, None, -1))):
        out = torch.zeros(tokens, 160)
        executors[threads].run(store, torch.flip(x, [0]) if order.step else x, routes, out)
        results.append(torch.flip(out, [0]) if order.step else out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_what_is_not_finite_stays_with_its_token(executors: dict[int, CpuExecutor], format: str, tokens: int) -> None:
    """Bug: padding codes times a neighbour's NaN, or a tile that carries it over."""
    store, x = random_store(ExpertSpec(70, 40), format, 2), torch.randn(tokens + 1, 70)
    x[0, 66] = float("nan")
    routes = build_routes(np.array([[0]] * tokens + [[1]]), np.ones((tokens + 1, 1), np.float32), 2)
    out = torch.zeros(tokens + 1, 70)
    executors[2].run(store, x, routes, out)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1:]).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_foreign_scales_have_no_effect(executors: dict[int, CpuExecutor], format: str, tokens: int) -> None:
    """Bug: scales of the next row or record are read with those of a short one."""
    store, x = random_store(ExpertSpec(40, 72), format, 3), torch.randn(tokens, 40)
    before = torch.zeros(tokens, 40)
    routes = build_routes(np.ones((tokens, 1), int), np.ones((tokens, 1), np.float32), 3)
    executors[2].run(store, x, routes, before)
    store.records[0], store.records[2] = 255, 255
    out = torch.zeros(tokens, 40)
    executors[2].run(ExpertStore(store.spec, store.layout, 3, store.records), x, routes, out)
    assert torch.equal(out, before)
