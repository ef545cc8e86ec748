"""The device's share of a step: launches in chunks, a window of slots, sums of all experts once each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moebius
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import open_device
from moebius.gpu_cache.executor import run_reference
from moebius.hf_plugin.running import streaming
from moebius.hf_plugin.running.streaming import DeviceShare
from moebius.kernels.routes import Routes, build_routes, select
from moebius.predictors.costs import Assignment, CostModel
from tests import zoo
from tests.gpu_cache.fake_device import FakeDevice
from tests.gpu_cache.layers import HIDDEN, make_layers, some
from tests.hf_plugin import helpers

EXPERTS = 12
LAYERS = make_layers((EXPERTS, EXPERTS), (2, 2))
NBYTES = LAYERS[0].layout.nbytes


@pytest.fixture(autouse=True)
def two_experts_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 2 * NBYTES)


def make_step(tokens: int, seed: int = 0) -> tuple[torch.Tensor, Routes]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(EXPERTS)[:6] for _ in range(tokens)])
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x, build_routes(ids, rng.random(ids.shape, np.float32), EXPERTS)


def start(cache: ExpertCache, x: torch.Tensor, routes: Routes, wanted: np.ndarray | None = None) -> DeviceShare:
    slots = cache.layer(0).lookup(routes.experts)
    chosen = np.ones(len(slots), bool) if wanted is None else wanted
    return DeviceShare(cache.layer(0), x, routes, slots, Assignment.where(chosen, routes, slots))


def expected(x: torch.Tensor, routes: Routes) -> torch.Tensor:
    layer = LAYERS[0]
    return run_reference(layer.spec, layer.layout, layer.records, x, routes, routes.experts)


def test_residents_do_not_wait_for_copies_and_chunks_only_for_their_own() -> None:
    """One launch behind all copies: the device idles while the link works, and the link afterwards."""
    device = FakeDevice()
    cache = ExpertCache(device, LAYERS, 2 * EXPERTS * NBYTES)
    cache.layer(0).fetch(some(0, 1, 2))
    cache.drain()
    cache.layer(0).finish()
    x, routes = make_step(8)
    share = start(cache, x, routes)
    waits = [len(computation.after) for computation in device.computations]
    assert waits == [0, 2, 2, 2]  # residents, then the window
    assert share.waiting
    first, *_, last = device.computations
    first.end()
    for copy in list(first.after) + list(device.computations[0].after):
        copy.wait()
    assert device.computations[0].ready
    assert not last.ready
    share.finish()
    assert not share.waiting
    got = share.launched[-1].launch.result()
    torch.testing.assert_close(got, expected(x, routes), rtol=1e-5, atol=1e-5)
    cache.layer(0).finish()


def test_heaviest_first() -> None:
    """Copies in the order of ids: the heaviest expert arrives last, and the device ends late."""
    device = FakeDevice()
    cache = ExpertCache(device, LAYERS, EXPERTS * NBYTES)
    x, routes = make_step(8)
    share = start(cache, x, routes)
    share.finish()
    counts = np.concatenate([np.sort(launched.computed)[::-1] for launched in share.launched])
    assert (np.diff(counts) <= 0).all()
    cache.layer(0).finish()


def test_the_window_bounds_the_slots_of_a_step() -> None:
    """A prompt that streams a layer through the cache must not displace what other layers have there."""
    device = FakeDevice()
    cache = ExpertCache(device, LAYERS, 2 * EXPERTS * NBYTES)
    x, routes = make_step(20)
    share = start(cache, x, routes)
    assert len(device.copies) == streaming.WINDOW * 2
    share.advance()
    assert len(device.copies) == streaming.WINDOW * 2, "began another chunk while none has arrived"
    for copy in device.copies[:2]:
        copy.wait()
    share.advance()
    assert len(device.copies) == streaming.WINDOW * 2
    share.finish()
    cache.layer(0).finish()
    assert share.fetched.all()


@pytest.mark.parametrize("slots", [2, 3, 4, 7])
def test_fewer_slots_than_experts(slots: int) -> None:
    """Rounds through few slots: an expert that is overwritten before it is computed, left out, or computed twice."""
    cache = ExpertCache(open_device("emulated"), LAYERS, slots * NBYTES)
    try:
        for seed in range(5):
            x, routes = make_step(20, seed)
            share = start(cache, x, routes)
            left = share.finish()
            assert not len(left)
            got = share.launched[-1].launch.result()
            cache.layer(0).finish()
            torch.testing.assert_close(got, expected(x, routes), rtol=1e-5, atol=1e-5)
    finally:
        cache.close()


def test_no_slot_to_be_had() -> None:
    """Another step holds all slots: what cannot be fetched is handed back, not lost."""
    device = FakeDevice()
    cache = ExpertCache(device, LAYERS, 2 * NBYTES, "ema")
    cache.layer(1).fetch(some(0, 1))
    cache.drain()
    cache.layer(1).lookup(some(0, 1))
    x, routes = make_step(4)
    share = start(cache, x, routes)
    assert sorted(share.finish()) == list(range(len(routes.experts)))
    assert not share.launched
    assert not share.fetched.any()
    cache.layer(0).finish()
    cache.layer(1).finish()


def test_a_failed_copy_is_an_error_of_the_step_and_the_cache_goes_on() -> None:
    """A sum without one of its experts."""
    device = FakeDevice()
    cache = ExpertCache(device, LAYERS, 4 * NBYTES)
    x, routes = make_step(8)
    share = start(cache, x, routes)
    device.copies[0].end(RuntimeError("injected"))
    share.finish()
    with pytest.raises(RuntimeError, match="injected"):
        share.launched[-1].launch.result()
    cache.layer(0).finish()
    again = start(cache, x, routes)
    again.finish()
    torch.testing.assert_close(again.launched[-1].launch.result(), expected(x, routes), rtol=1e-5, atol=1e-5)
    cache.layer(0).finish()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 99), st.lists(st.integers(0, 11), max_size=4))
def test_any_share_is_computed_once(slots: int, tokens: int, seed: int, before: list[int]) -> None:
    """Any mixture of residents, fetched experts and the CPU's, in any pool."""
    cache = ExpertCache(FakeDevice(), LAYERS, slots * NBYTES)
    cache.layer(0).fetch(some(*sorted(set(before))))
    cache.drain()
    cache.layer(0).finish()
    x, routes = make_step(tokens, seed)
    wanted = np.random.default_rng(seed).random(len(routes.experts)) < 0.7
    share = start(cache, x, routes, wanted)
    left = np.isin(np.arange(len(wanted)), share.finish())
    assert not (left & ~wanted).any()
    done = wanted & ~left
    got = share.launched[-1].launch.result() if share.launched else torch.zeros_like(x)
    torch.testing.assert_close(got, expected(x, select(routes, done)), rtol=1e-5, atol=1e-5)
    cache.layer(0).finish()
    assert (cache._pools[0].table.pins == 0).all()


SPLITS = {
    "all fetched": lambda slots: np.ones(len(slots), bool),
    "half each": lambda slots: np.arange(len(slots)) % 2 == 0,
    "residents on the CPU": lambda slots: slots < 0,
}


@pytest.mark.parametrize("budget", [0.1, 0.5])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_gives_stock_text(split, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are left out or counted twice where both processors wait for each other."""
    monkeypatch.setattr(CostModel, "assign", lambda _, routes, slots: Assignment.where(split(slots), routes, slots))
    model = zoo.build("qwen3_moe")
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)
    ids = helpers.prompt(model, 3, 20)
    want, text = helpers.logits(model, ids), helpers.greedy(model, ids)
    with helpers.patched(model, **helpers.EMULATED | {"gpu_memory": budget, "emulated_link": 20.0}):
        for _ in range(3):
            helpers.assert_close(helpers.logits(model, ids), want)
        assert helpers.greedy(model, ids) == text
        stats = moebius.stats(model).to_dict()
    assert stats["demand_fetches"] > 0
    assert stats["uploads"] >= stats["demand_fetches"]
