"""The CPU path as the dispatcher sees it: every shape, format and activation, on any number of threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.cpu_experts.executor import CpuExecutor
from moebius.kernels import reference
from moebius.kernels.experts import Act, Activation, ExpertSpec
from moebius.kernels.routes import Routes, build_routes

from .moe_layers import draw_spec, expected, random_routes, random_store, size_of_sums

FORMATS = ["fp32", "bf16", "fp16"]
ALL_FORMATS = [*FORMATS, "int8", "int4"]
X_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [
    Activation(),
    Activation(Act.SILU, alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
    Activation(Act.SILU, act_max=0.5),
    Activation(Act.GELU_TANH),
    Activation(Act.GELU_ERF),
    Activation(Act.RELU),
    Activation(Act.RELU2),
    Activation(Act.SOFTCAP_SILU, gate_max=3.0, up_max=2.0),
]


def _run(executor: CpuExecutor, store, x, routes, out=None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    result = torch.zeros(x.shape) if out is None else out.clone()
    executor.run(store, x, routes, result)
    return result


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_equals_the_float64_reference(executors: dict[int, CpuExecutor], data: st.DataObject) -> None:
    """Bug: wrong tails of odd sizes, biases, ungated experts, partial groups of tokens, sums of duplicates."""
    size = st.integers(1, 70) | st.sampled_from([64, 96, 128, 129, 200])
    spec = draw_spec(data, size, ACTIVATIONS)
    experts = data.draw(st.integers(1, 6), "experts")
    k, tokens = data.draw(st.integers(1, experts), "k"), data.draw(st.integers(0, 20) | st.just(90), "tokens")
    seed = data.draw(st.integers(0, 2**16), "seed")
    store = random_store(spec, data.draw(st.sampled_from(FORMATS)), experts, seed)
    x = torch.randn(tokens, spec.hidden, generator=torch.Generator().manual_seed(seed))
    x = x.to(data.draw(st.sampled_from(X_DTYPES)))
    routes, out = random_routes(tokens, k, experts, seed), torch.full((tokens, spec.hidden), 0.25)
    threads = data.draw(st.sampled_from(sorted(executors)), "threads")
    result = _run(executors[threads], store, x, routes, out)
    in_bf16 = x.dtype == torch.bfloat16 and store.layout.format == "bf16"  # then intermediates may be rounded to bf16
    bound = (2**-8 if in_bf16 else 2**-21) * size_of_sums(store, x, routes)
    assert ((result.double() - expected(store, x, routes, out)).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
def test_error_is_that_of_fp32_arithmetic(executors: dict[int, CpuExecutor], format: str, tokens: int) -> None:
    """Bug: an intermediate rounded to 16 bits, or sums kept in less than fp32."""
    store = random_store(ExpertSpec(512, 384), format, 4)
    x, routes = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)), random_routes(tokens, 3, 4)
    exact = expected(store, x, routes, torch.zeros(tokens, 512))
    single = torch.zeros(tokens, 512)
    reference.moe_forward(store.spec, [store.weights(int(e)) for e in routes.experts], x, routes, single)
    ours = (_run(executors[2], store, x, routes).double() - exact).norm()
    assert ours <= 1.5 * (single.double() - exact).norm()


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=["silu", "gpt-oss"])
def test_error_of_bf16_layers_is_below_that_of_torch(
    executors: dict[int, CpuExecutor], activation: Activation, tokens: int
) -> None:
    """Bug: products of bf16 summed in bf16, or more of the intermediate rounded than torch rounds."""
    store = random_store(ExpertSpec(500, 390, activation=activation), "bf16", 3)
    x = torch.randn(tokens, 500, generator=torch.Generator().manual_seed(1)).bfloat16()
    routes = random_routes(tokens, 3, 3)
    exact, stock = expected(store, x, routes, torch.zeros(tokens, 500)), torch.zeros(tokens, 500).bfloat16()
    reference.moe_forward(store.spec, [store.weights(int(e)) for e in routes.experts], x, routes, stock)
    ours = (_run(executors[2], store, x, routes).double() - exact).norm()
    assert ours <= (stock.double() - exact).norm()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ALL_FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 30])
def test_result_is_bitwise_independent_of_threads(
    executors: dict[int, CpuExecutor], format: str, tokens: int, x_dtype: torch.dtype
) -> None:
    """Bug: two threads share a sum, so results change from run to run."""
    store = random_store(ExpertSpec(200, 130, biased=True), format, 5)
    x, routes = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(2)), random_routes(tokens, 4, 5)
    x = x.to(x_dtype)
    one = _run(executors[1], store, x, routes)
    assert one.abs().max() > 0
    for executor in executors.values():
        for _ in range(10):
            assert torch.equal(_run(executor, store, x, routes), one)


@pytest.mark.parametrize("hidden", [256, 300, 544, 1000])
def test_wide_units_cover_every_output_column_once(executors: dict[int, CpuExecutor], hidden: int) -> None:
    """Bug: a gap or an overlap where the units of many pairs become narrower."""
    store = random_store(ExpertSpec(hidden, 64), "bf16", 3)
    x = torch.randn(40, hidden, generator=torch.Generator().manual_seed(4)).bfloat16()
    routes, out = build_routes(np.tile([0, 2], (40, 1)), np.ones((40, 2), np.float32), 3), torch.zeros(40, hidden)
    bound = 2**-8 * size_of_sums(store, x, routes) + 1e-5
    for executor in executors.values():
        result = _run(executor, store, x, routes)
        assert ((result.double() - expected(store, x, routes, out)).abs() <= bound).all()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [2, 5, 8, 11, 70])
def test_result_is_bitwise_independent_of_token_order(
    executors: dict[int, CpuExecutor], format: str, tokens: int
) -> None:
    """Bug: the last tokens of a group take another path than the first, so batching changes the text."""
    store, rng = random_store(ExpertSpec(77, 50), format, 3), np.random.default_rng(3)
    x = torch.randn(tokens, 77, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids = np.stack([rng.permutation(3)[:2] for _ in range(tokens)])
    weights = rng.standard_normal((tokens, 2)).astype(np.float32)
    order = rng.permutation(tokens)
    plain = _run(executors[2], store, x, build_routes(ids, weights, 3))
    shuffled = _run(executors[2], store, x[order].contiguous(), build_routes(ids[order], weights[order], 3))
    assert torch.equal(shuffled, plain[order])


def test_routes_add_to_what_is_there_and_none_leaves_it(executors: dict[int, CpuExecutor]) -> None:
    """Bug: `out` is overwritten, so the other processor's part is lost."""
    store, x = random_store(ExpertSpec(9, 5), "fp32", 2), torch.randn(3, 9)
    before = torch.randn(3, 9)
    nothing = build_routes(np.full((3, 1), -1), np.ones((3, 1), np.float32), 2)
    assert torch.equal(_run(executors[2], store, x, nothing, before), before)
    routes = build_routes(np.array([[0], [-1], [1]]), np.ones((3, 1), np.float32), 2)
    after = _run(executors[2], store, x, routes, before)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42])
@pytest.mark.parametrize("place", ["x", "gate", "up", "down"])
def test_special_values_go_where_torch_lets_them_go(
    executors: dict[int, CpuExecutor], value: float, place: str
) -> None:
    """Bug: a tile that reads a neighbour's NaN, a masked tail that makes one, a flag that hides one."""
    store, x = random_store(ExpertSpec(37, 21, activation=ACTIVATIONS[1]), "fp32", 2), torch.randn(6, 37)
    (x if place == "x" else getattr(store.weights(0), place))[1, -1] = value
    routes = build_routes(np.array([[0, 1]] * 3 + [[1, 1]] * 3), np.ones((6, 2), np.float32), 2)
    exact = expected(store, x, routes, torch.zeros(6, 37))
    torch.testing.assert_close(
        _run(executors[2], store, x, routes).double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5
    )


def test_custom_activation_and_norm_run_as_torch_code(executors: dict[int, CpuExecutor]) -> None:
    """Bug: the module's own code is replaced by a formula, or its norm is applied after the weight."""
    spec = ExpertSpec(
        12, 7, activation=Activation(Act.CUSTOM), custom=lambda h: h[:, :7].sin() * h[:, 7:],
        post_norm=lambda y: torch.nn.functional.rms_norm(y, (12,)),
    )  # fmt: skip
    store, x, routes = random_store(spec, "bf16", 3), torch.randn(4, 12), random_routes(4, 2, 3)
    exact = expected(store, x, routes, torch.zeros(4, 12))
    torch.testing.assert_close(_run(executors[2], store, x, routes).double(), exact, rtol=1e-5, atol=1e-5)


def test_exception_of_custom_code_reaches_the_caller_and_the_executor_lives_on(
    executors: dict[int, CpuExecutor],
) -> None:
    """Bug: the lock stays taken after a failure, and the next call hangs."""

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("from the model's own code")

    bad = random_store(ExpertSpec(12, 7, activation=Activation(Act.CUSTOM), custom=broken), "fp32", 3)
    good, x, routes = random_store(ExpertSpec(12, 7), "fp32", 3), torch.randn(4, 12), random_routes(4, 2, 3)
    with pytest.raises(ArithmeticError, match="own code"):
        _run(executors[2], bad, x, routes)
    assert _run(executors[2], good, x, routes).abs().max() > 0


def _routes(experts: list[int], offsets: list[int], tokens: list[int]) -> Routes:
    arrays = (np.array(part, np.int32) for part in (experts, offsets, tokens))
    return Routes(*arrays, np.ones(len(tokens), np.float32))


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (_routes([0, 3], [0, 1, 2], [0, 1]), r"experts 0\.\.3"),
        (_routes([-1], [0, 1], [0]), r"experts -1"),
        (_routes([0], [0, 1], [4]), r"tokens 4\.\.4"),
        (_routes([0], [0, 2], [0, -1]), r"tokens -1"),
        (_routes([0], [0, 3], [0, 1]), "offsets"),
        (_routes([0, 1], [0, 2, 1], [0]), "offsets"),
        (_routes([0], [0], [0]), "offsets"),
    ],
)
def test_routes_out_of_range_raise(
    executors: dict[int, CpuExecutor], routes: Routes, message: str, custom: bool
) -> None:
    """Bug: a wrong id reads or writes memory outside the layer, or counts from the end."""
    spec = ExpertSpec(8, 4, post_norm=torch.tanh if custom else None)
    store, out = random_store(spec, "fp32", 3), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=message):
        executors[2].run(store, torch.ones(4, 8), routes, out)
    assert not out.any()


@pytest.mark.parametrize(
    ("x", "out", "error"),
    [
        (torch.ones(4, 9), torch.zeros(4, 9), ValueError),
        (torch.ones(4, 8), torch.zeros(3, 8), ValueError),
        (torch.ones(8, 4).T, torch.zeros(4, 8), ValueError),
        (torch.ones(4, 8), torch.zeros(8, 4).T, ValueError),
        (torch.ones(4, 8).double(), torch.zeros(4, 8), TypeError),
        (torch.ones(4, 8), torch.zeros(4, 8).bfloat16(), TypeError),
    ],
)
def test_tensors_of_another_kind_raise(
    executors: dict[int, CpuExecutor], x: torch.Tensor, out: torch.Tensor, error: type[Exception]
) -> None:
    """Bug: kernels that take addresses read a transposed or double tensor as if it were theirs."""
    store, routes = random_store(ExpertSpec(8, 4), "fp32", 3), _routes([0], [0, 1], [0])
    with pytest.raises(error):
        executors[2].run(store, x, routes, out)


def test_several_callers_at_once_get_their_own_results(executors: dict[int, CpuExecutor]) -> None:
    """Bug: two calls share scratch memory or a job."""
    stores = [
        random_store(ExpertSpec(64, 48), format, 4, seed)
        for seed, format in enumerate(["fp32", "bf16", "int8", "int4"])
    ]
    xs = [torch.randn(tokens, 64) for tokens in (1, 3, 6, 1)]
    routes = [random_routes(len(x), 2, 4, seed=7) for x in xs]
    alone = [_run(executors[1], *case) for case in zip(stores, xs, routes, strict=True)]
    barrier, wrong = threading.Barrier(4), []

    def call(i: int) -> None:
        barrier.wait()
        for _ in range(50):
            if not torch.equal(_run(executors[5], stores[i], xs[i], routes[i]), alone[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_calls_after_close_raise() -> None:
    """Bug: a closed executor hangs its caller, or computes with memory that it gave back."""
    executor = CpuExecutor(3)
    store, x, routes = random_store(ExpertSpec(8, 4), "fp32", 3), torch.ones(4, 8), random_routes(4, 2, 3)
    _run(executor, store, x, routes)
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        _run(executor, store, x, routes)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_is_refused(threads: int) -> None:
    """Bug: zero threads mean that nobody computes, and the caller waits."""
    with pytest.raises(ValueError, match="at least 1"):
        CpuExecutor(threads)


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_earlier_calls_left_in_scratch_memory_is_not_read(format: str, dtype: torch.dtype) -> None:
    """Bug: zero weights beyond the last row of a short block are multiplied with what lies there, which may be NaN."""
    store, x = random_store(ExpertSpec(40, 40), format, 1), torch.ones(20, 40, dtype=dtype)
    routes, out = build_routes(np.zeros((20, 1), int), np.ones((20, 1), np.float32), 1), torch.zeros(20, 40)
    executor = CpuExecutor(1)
    executor._reserve(1 << 20).fill(0xFF)
    executor.run(store, x, routes, out)
    executor.close()
    assert torch.isfinite(out).all()
