"""int8 and int4 experts: the kernels' integers against the same rounding in float64, and the error on real numbers."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels import reference
from moebius.kernels.experts import Act, Activation, ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes

from .moe_layers import draw_spec, expected_quantized, random_routes, random_store, size_of_bf16

ACTIVATIONS = [
    Activation(),
    Activation(Act.SILU, alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
    Activation(Act.GELU_ERF),
    Activation(Act.RELU2),
]
FORMATS = ["int4", "int8", "mxfp4"]
TOLERANCE = {"int8": 1e-4, "int4": 1e-2, "mxfp4": 1e-4}  # one step of a rounded intermediate, and fp32 sums


def _before_a_guard_page(records: torch.Tensor) -> torch.Tensor:
    """A copy of records whose end is followed by a page that must not be read."""
    page = mmap.PAGESIZE
    size = -(-records.numel() // page) * page
    memory = torch.frombuffer(mmap.mmap(-1, size + page), dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(memory.data_ptr() + size, page, 0) == 0
    copy = memory[size - records.numel() : size].view(records.shape)
    return copy.copy_(records)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_equals_the_same_rounding_in_float64(executors: dict[int, CpuExecutor], data: st.DataObject) -> None:
    """Bug: a tail of a row, a group, a chunk of 16 groups, a tile or a batch of pairs that reads its neighbour."""
    size = st.integers(1, 70) | st.sampled_from([96, 128, 129, 200, 510, 513, 600])
    spec = draw_spec(data, size, ACTIVATIONS)
    experts = data.draw(st.integers(1, 6), "experts")
    k, tokens = data.draw(st.integers(1, experts), "k"), data.draw(st.integers(0, 20) | st.just(90), "tokens")
    seed, format = data.draw(st.integers(0, 2**16), "seed"), data.draw(st.sampled_from(FORMATS))
    store = random_store(spec, format, experts, seed)
    x = torch.randn(tokens, spec.hidden, generator=torch.Generator().manual_seed(seed))
    x = x.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    routes, out = random_routes(tokens, k, experts, seed), torch.full((tokens, spec.hidden), 0.25)
    exact, size_of_sums = expected_quantized(store, x, routes, out)
    executors[data.draw(st.sampled_from(sorted(executors)), "threads")].run(store, x, routes, out)
    bound = TOLERANCE[format] * size_of_sums + size_of_bf16(store, x, routes) + 1e-5
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.0105), ("int4", 0.155)])
def test_error_of_a_layer_against_unquantised_weights(
    executors: dict[int, CpuExecutor], format: str, bound: float, tokens: int
) -> None:
    """Bug: activations rounded so coarsely that they, not the weights, make the error (0.0092 and 0.141 without)."""
    spec, generator = ExpertSpec(512, 384), torch.Generator().manual_seed(0)
    store = ExpertStore.empty(spec, RecordLayout.of(spec, format), 2)
    weights = {n: torch.randn(2, *s, generator=generator) * s[-1] ** -0.5 for n, s in store.layout.shapes().items()}
    pack(store.layout, store.records, weights)
    x, out = torch.randn(tokens, 512, generator=generator).bfloat16(), torch.zeros(tokens, 512)
    routes = build_routes(np.tile([0, 1], (tokens, 1)), np.full((tokens, 2), 0.5, np.float32), 2)
    executors[2].run(store, x, routes, out)
    exact = torch.zeros(tokens, 512, dtype=torch.float64)
    plain = [ExpertWeights(*(weights[name][e] for name in ("gate", "up", "down")), None, None, None) for e in (0, 1)]
    reference.moe_forward(spec, plain, x, routes, exact)
    assert (out.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_finite_stays_visible_and_with_its_token(
    executors: dict[int, CpuExecutor], format: str, value: float, tokens: int
) -> None:
    """Bug: a group's rounding hides NaN, or a tile carries it to the neighbours."""
    store, x = random_store(ExpertSpec(70, 40), format, 2), torch.randn(tokens + 1, 70)
    x[0, 66] = value
    routes = build_routes(np.array([[0]] * tokens + [[1]]), np.ones((tokens + 1, 1), np.float32), 2)
    out = torch.zeros(tokens + 1, 70)
    executors[2].run(store, x, routes, out)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1:]).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1e30])
def test_inputs_of_any_size(executors: dict[int, CpuExecutor], format: str, size: float) -> None:
    """Bug: the inverse of a tiny scale overflows, or a zero group divides by zero."""
    store = random_store(ExpertSpec(40, 40, activation=Activation(Act.RELU), gated=False), format, 1)
    routes = build_routes(np.zeros((3, 1), int), np.ones((3, 1), np.float32), 1)
    x, out, unit = torch.ones(3, 40), torch.zeros(3, 40), torch.zeros(3, 40)
    executors[1].run(store, x, routes, unit)
    executors[1].run(store, x * size, routes, out)
    torch.testing.assert_close(out, unit * size, rtol=1e-4, atol=1e-36 if size else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_infinite_scales_of_weights_stay_with_their_expert(executors: dict[int, CpuExecutor], format: str) -> None:
    """Bug: scales of the next row or record, loaded beside those of a short row, are multiplied by zero: NaN."""
    store, x = random_store(ExpertSpec(40, 72), format, 3), torch.randn(2, 40)
    for name, part in store.layout.stored(store.records).items():
        if name.endswith("_scale"):
            part[0], part[2] = (255, 255) if part.dtype == torch.uint8 else (float("inf"), float("nan"))
    for tokens in (1, 2):
        routes = build_routes(np.ones((tokens, 1), int), np.ones((tokens, 1), np.float32), 3)
        out = torch.zeros(tokens, 40)
        executors[2].run(store, x[:tokens], routes, out)
        assert torch.isfinite(out).all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_nothing_is_read_beyond_the_records(executors: dict[int, CpuExecutor], format: str, tokens: int) -> None:
    """Bug: a vector load passes the end of the last record into a page that is not there, and the process dies."""
    for spec in (ExpertSpec(33, 1, gated=False), ExpertSpec(64, 64), ExpertSpec(7, 130, biased=True)):
        source = random_store(spec, format, 2)
        store = ExpertStore(spec, source.layout, 2, _before_a_guard_page(source.records))
        out, x = torch.zeros(tokens, spec.hidden), torch.randn(tokens, spec.hidden)
        routes = build_routes(np.ones((tokens, 1), int), np.ones((tokens, 1), np.float32), 2)
        executors[2].run(store, x, routes, out)
        again = torch.zeros_like(out)
        executors[2].run(source, x, routes, again)
        assert torch.equal(out, again)
