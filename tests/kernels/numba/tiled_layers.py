"""Run by `test_tiles.py` in a process of its own: whole layers in tiles, on a machine that need not have any.

The functions of `amx` are replaced by the same operations in plain loops, for which every thread has tiles of its own.
They notice what a processor would refuse, or silently do wrong: tiles that are not configured, or not released, sizes
that do not fit each other. What is compiled must not be kept, since the addresses of this process's tiles are in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numba
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "cpu_experts"))
from moe_layers import draw_spec, expected, random_routes, random_store, sum_up

from moebius.cpu_experts.executor import CpuExecutor
from moebius.kernels.experts import Act, Activation, ExpertSpec
from moebius.kernels.numba import amx
from moebius.kernels.numba.jit import helper
from moebius.kernels.numba.memory import atomic_add, peek, poke, widen
from moebius.kernels.routes import build_routes

_SLOTS, _TILE = 64, 1024
_SLOT = 64 + 64 + 8 * _TILE  # the thread, the configuration, the tiles
_memory = np.zeros((_SLOTS + 2) * _SLOT, np.uint8)
_BASE = _memory.ctypes.data
_NOBODY = _BASE + _SLOTS * _SLOT  # what a thread without a configuration works on
_ERRORS, _NEXT, _PRODUCTS = (_NOBODY + _SLOT + place for place in (0, 64, 128))
_thread = numba.types.ExternalFunction("pthread_self", numba.int64())
_I64, _U16, _U8, _F32 = np.int64(0), np.uint16(0), np.uint8(0), np.float32(0)


@helper
def _state():  # type: ignore[no-untyped-def]
    me = _thread()
    for slot in range(_SLOTS):
        if peek(_BASE + _SLOT * slot, _I64) == me:
            return _BASE + _SLOT * slot
    atomic_add(_ERRORS, 1)
    return _NOBODY


@helper
def load_config(address):  # type: ignore[no-untyped-def]
    state = _BASE + _SLOT * (atomic_add(_NEXT, 1) % _SLOTS)
    if peek(address, _U8) != 1:
        atomic_add(_ERRORS, 1)
    for place in range(64):
        value = peek(address + place, _U8)
        poke(state + 64 + place, value)
        sizes = 16 <= place < 32 or 48 <= place < 56
        if place > 0 and not sizes and value != 0:
            atomic_add(_ERRORS, 1)
    for tile in range(8):
        if _rows(state, tile) > 16 or _bytes(state, tile) > 64:
            atomic_add(_ERRORS, 1)
        zero_at(state, tile)
    poke(state, _thread())


@helper
def release():  # type: ignore[no-untyped-def]
    poke(_state(), np.int64(0))


@helper
def _rows(state, tile):  # type: ignore[no-untyped-def]
    return np.int64(peek(state + 64 + 48 + tile, _U8))


@helper
def _bytes(state, tile):  # type: ignore[no-untyped-def]
    return np.int64(peek(state + 64 + 16 + 2 * tile, _U16))


@helper
def _row(state, tile, row):  # type: ignore[no-untyped-def]
    return state + 128 + _TILE * tile + 64 * row


@helper
def zero_at(state, tile):  # type: ignore[no-untyped-def]
    for place in range(0, _TILE, 8):
        poke(_row(state, tile, 0) + place, np.int64(0))


@helper
def zero(tile):  # type: ignore[no-untyped-def]
    zero_at(_state(), tile)


@helper
def load(tile, address, pitch):  # type: ignore[no-untyped-def]
    state = _state()
    zero_at(state, tile)
    for row in range(_rows(state, tile)):
        for place in range(_bytes(state, tile)):
            poke(_row(state, tile, row) + place, peek(address + pitch * row + place, _U8))


@helper
def store(tile, address, pitch):  # type: ignore[no-untyped-def]
    state = _state()
    for row in range(_rows(state, tile)):
        for place in range(_bytes(state, tile)):
            poke(address + pitch * row + place, peek(_row(state, tile, row) + place, _U8))


@helper
def _depth(state, total, left, right):  # type: ignore[no-untyped-def]
    fits = _rows(state, total) == _rows(state, left) and _bytes(state, total) == _bytes(state, right)
    if not fits or _bytes(state, left) != 4 * _rows(state, right):
        atomic_add(_ERRORS, 1)
    atomic_add(_PRODUCTS, 1)
    return _rows(state, right)


@helper
def dot_bf16(total, left, right):  # type: ignore[no-untyped-def]
    state = _state()
    depth = _depth(state, total, left, right)
    for m in range(_rows(state, total)):
        for n in range(_bytes(state, total) // 4):
            place = _row(state, total, m) + 4 * n
            value = peek(place, _F32)
            for k in range(depth):
                for i in range(2):
                    a = widen(peek(_row(state, left, m) + 4 * k + 2 * i, _U16))
                    value += a * widen(peek(_row(state, right, k) + 4 * n + 2 * i, _U16))
            poke(place, value)


def _counter(address: int) -> int:
    return int(_memory[address - _BASE :][:8].view(np.int64)[0])


def errors() -> int:
    """What went wrong so far; tiles that a thread has kept count too."""
    threads = _memory[: _SLOTS * _SLOT].view(np.int64).reshape(_SLOTS, -1)[:, 0]
    return _counter(_ERRORS) + int((threads != 0).sum())


ACTIVATIONS = [
    Activation(),
    Activation(Act.SILU, alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0),
    Activation(Act.GELU_ERF),
]
FORMATS = ["bf16", "int4", "fp8"]
executors = {threads: CpuExecutor(threads) for threads in (1, 2, 5)}


def run(threads: int, store, x, routes, out):  # type: ignore[no-untyped-def]
    result = out.clone()
    executors[threads].run(store, x, routes, result)
    assert not errors()
    return result


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.data())
def test_equals_the_float64_reference(data: st.DataObject) -> None:
    """Bug: tails of rows and columns, more blocks than tiles, more columns than a panel, few pairs beside many."""
    size = st.integers(1, 70) | st.sampled_from([64, 129, 200, 513, 1100])
    spec = draw_spec(data, size, ACTIVATIONS)
    experts = data.draw(st.integers(1, 4), "experts")
    k, tokens = data.draw(st.integers(1, experts), "k"), data.draw(st.integers(8, 40) | st.just(90), "tokens")
    seed = data.draw(st.integers(0, 2**16), "seed")
    store, routes = random_store(spec, "bf16", experts, seed), random_routes(tokens, k, experts, seed)
    x = torch.randn(tokens, spec.hidden, generator=torch.Generator().manual_seed(seed))
    x = x.to(data.draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float32])))
    out = torch.full((tokens, spec.hidden), 0.25)
    result = run(data.draw(st.sampled_from([1, 2, 5])), store, x, routes, out)
    rounded = torch.Tensor.double if x.dtype == torch.float32 else lambda values: values.bfloat16().double()
    exact, sums = sum_up(store, x, routes, out, rounded)
    assert ((result.double() - exact).abs() <= 2**-7 * sums + 1e-5).all()  # a rounded intermediate may be the next one


def test_other_formats_have_the_error_of_bf16_products() -> None:
    """Bug: weights unpacked in an order that tiles do not expect."""
    for format in FORMATS[1:]:
        store, routes = random_store(ExpertSpec(129, 70, biased=True), format, 3), random_routes(60, 2, 3)
        x = torch.randn(60, 129, generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = expected(store, x, routes, torch.zeros(60, 129))
        assert (run(2, store, x, routes, torch.zeros(60, 129)).double() - exact).norm() <= 0.01 * exact.norm()


def test_result_is_bitwise_independent_of_threads_and_of_token_order() -> None:
    """Bug: a token's place in its block, or the number of blocks, changes its sums."""
    rng = np.random.default_rng(3)
    for format in FORMATS:
        store = random_store(ExpertSpec(77, 50), format, 3)
        for tokens in (9, 30, 70):
            x = torch.randn(tokens, 77, generator=torch.Generator().manual_seed(3)).bfloat16()
            ids = np.stack([rng.permutation(3)[:2] for _ in range(tokens)])
            weights, order = rng.standard_normal((tokens, 2)).astype(np.float32), rng.permutation(tokens)
            out, routes = torch.zeros(tokens, 77), build_routes(ids, weights, 3)
            before = _counter(_PRODUCTS)
            plain = run(1, store, x, routes, out)
            assert tokens < 12 or _counter(_PRODUCTS) > before
            shuffled = build_routes(ids[order], weights[order], 3)
            for threads in (1, 2, 5):
                assert torch.equal(run(threads, store, x, routes, out), plain)
                assert torch.equal(run(threads, store, x[order].contiguous(), shuffled, out), plain[order])


def test_what_is_not_finite_stays_with_its_token_and_its_row() -> None:
    """Bug: a tile's padding, or the next row read beside a tail, multiplies NaN by zero."""
    for format in FORMATS:
        store, x = random_store(ExpertSpec(70, 40), format, 2), torch.randn(20, 70).bfloat16()
        x[0, 66] = float("nan")
        routes = build_routes(np.zeros((20, 1), int), np.ones((20, 1), np.float32), 2)
        out = run(2, store, x, routes, torch.zeros(20, 70))
        assert not torch.isfinite(out[0]).any()
        assert torch.isfinite(out[1:]).all()
    store = random_store(ExpertSpec(35, 40), "bf16", 2)
    store.weights(0).down[1:] = float("nan")  # behind the last column of row 0 and in all others
    routes = build_routes(np.zeros((20, 1), int), np.ones((20, 1), np.float32), 2)
    out = run(2, store, torch.randn(20, 35).bfloat16(), routes, torch.zeros(20, 35))
    assert torch.isfinite(out[:, 0]).all()
    assert torch.isnan(out[:, 1:]).all()


def test_the_emulation_notices_mistakes() -> None:
    """A checker that cannot fail proves nothing."""
    probe = numba.njit(lambda: zero(0))
    probe()
    assert errors() == 1
    _memory[_ERRORS - _BASE :][:8] = 0


if __name__ == "__main__":
    for name in ("load_config", "release", "zero", "load", "store", "dot_bf16"):
        setattr(amx, name, globals()[name])
    amx.available = lambda: True
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name)
    for executor in executors.values():
        executor.close()
