"""The cost model that the dispatcher splits by: kept current by copies and launches, and shown."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

import moebius
from moebius.cpu_experts.executor import CpuExecutor
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.hf_plugin.running import calibration
from moebius.hf_plugin.running.dispatcher import Ran, Tier
from moebius.kernels.routes import build_routes
from moebius.predictors.costs import CostModel, ExpertCost
from tests import zoo
from tests.gpu_cache.fake_device import FakeDevice
from tests.gpu_cache.layers import HIDDEN, make_layers, one_token, some
from tests.hf_plugin import helpers


def make_tier(upload_us: float = 100.0) -> tuple[Tier, FakeDevice]:
    device, layers = FakeDevice(), make_layers()
    cache = ExpertCache(device, layers, 8 * layers[0].layout.nbytes)
    costs = CostModel(ExpertCost.line(31.0, 1.0), ExpertCost.line(10.0, 0.1), upload_us)
    return Tier(cache, torch.device("cpu"), costs), device


def upload(tier: Tier, device: FakeDevice, took_us: float) -> None:
    tier.cache.resize(8 * make_layers()[0].layout.nbytes)
    tier.cache.layer(0).prefetch(some(0, 1))
    for copy in list(device.copies):
        copy.took_us = took_us
        copy.end()
    tier.cache.drain()
    tier.observe_copies()


def test_the_upload_cost_follows_a_link_whose_speed_changes():
    """A split by the speed that the link had when the model was patched."""
    tier, device = make_tier(100.0)
    for speed in (400.0, 50.0):
        for _ in range(60):
            upload(tier, device, speed)
        assert tier.costs.upload_us == pytest.approx(speed, rel=0.02)


def test_a_slower_link_changes_the_split():
    routes = build_routes(np.arange(5)[None], np.ones((1, 5), np.float32), 5)
    routed = routes, np.array([0, -1, -1, -1, -1], np.int32)
    tier, device = make_tier(10.0)
    assert len(tier.costs.assign(*routed).fetches)
    for _ in range(60):
        upload(tier, device, 1000.0)
    assert not len(tier.costs.assign(*routed).fetches)


@pytest.mark.parametrize(("real_link", "factor"), [(True, 2.0), (False, 1.0)])
def test_copies_slow_the_cpu_down_only_where_there_is_a_link(monkeypatch, real_link, factor):
    """An emulated device without a link, whose made-up copies were said to slow the CPU down."""
    monkeypatch.setattr(FakeDevice, "real_link", real_link)
    tier, _ = make_tier(100.0)
    for _ in range(200):
        tier.observe_cpu(np.array([70]), 150.0, fetched=1)  # 100 us alone
    assert tier.costs.slowdown == pytest.approx(factor, abs=0.01)
    tier.observe_cpu(np.array([1]), 62.0, fetched=0)
    assert tier.costs.cpu.curve[0] > 31.0


class Finished:
    def __init__(self, took_us: float | None) -> None:
        self.took_us = took_us

    def done(self) -> bool:
        return self.took_us is not None

    def elapsed_us(self) -> float | None:
        return self.took_us


def _runtime(model: Any) -> Any:
    [layer, *_] = helpers.experts_modules(model)
    return vars(layer)["_moebius"].runtime


def test_launch_times_refine_the_gpu_cost():
    """A launch whose time is added to the counters but teaches nothing, or is counted before it has ended."""
    model = zoo.build("qwen3_moe")
    with helpers.patched(model, **helpers.EMULATED):
        helpers.greedy(model, helpers.prompt(model, 1))
        runtime = _runtime(model)
        tier, tokens = runtime.tiers[0], np.array([2, 1])
        tier.device, tier.costs.gpu = torch.device("cuda"), ExpertCost.line(11.0, 1.0)
        for _ in range(100):
            tier.launches = deque([Ran(0, Finished(us), np.zeros(len(tokens)), tokens) for us in (230.0, None)])
            before = runtime.counters[0].gpu_ms
            runtime.count_launches(tier)
            assert runtime.counters[0].gpu_ms - before == pytest.approx(0.230)
        assert tier.costs.gpu.call(tokens) == pytest.approx(230.0, rel=0.02)
        assert len(tier.launches) == 1
        tier.launches.clear()


def test_emulated_launches_teach_nothing():
    """The stand-in's speed, by which no GPU would get any work."""
    tier, _ = make_tier()
    before = tier.costs.gpu.curve.copy()
    launch = tier.cache.layer(0).launch(torch.zeros(1, HIDDEN), one_token(some()), some())
    tier.observe_launch(Ran(0, launch.completion, some(0), some(1)), 1e5)
    assert (tier.costs.gpu.curve == before).all()


def test_costs_are_shown():
    """Numbers that decide where experts run, and that nobody can see; real copies that are not timed."""
    model = zoo.build("qwen3_moe")
    with helpers.patched(model, **helpers.EMULATED | {"emulated_link": 0.1}):
        helpers.greedy(model, helpers.prompt(model, 1))
        _runtime(model).tiers[0].cache.drain()
        table, stats = str(moebius.stats(model)), moebius.stats(model).to_dict()
    costs = stats["costs"]
    assert costs["cpu_error"] > 0
    assert costs["upload_error"] > 0
    assert costs["gpu_error"] is None  # an emulated device's own speed is not compared with anything
    assert f"upload {costs['upload_us']:.0f} us (off by {100 * costs['upload_error']:.0f} %)" in table
    assert costs["upload_us"] > 0
    assert costs["slowdown"] >= 1
    assert len(costs["tokens"]) == len(costs["cpu_us"]) == len(costs["gpu_us"])
    assert min(costs["cpu_us"] + costs["gpu_us"]) > 0
    assert 0 < stats["copies"] <= stats["uploads"]
    assert stats["copy_us"] > 0
    with helpers.patched(model, device="cpu"):
        assert moebius.stats(model).to_dict()["costs"] == {}


@pytest.mark.parametrize(("us", "measured"), [(100.0, [1, 8, 64, 256]), (1e6, [1, 8])], ids=["fast", "slow"])
def test_compiling_leaves_time_to_measure(us, measured):
    """A first use that compiles for seconds, after which prompts are judged by what single tokens cost."""
    compiled, asked = set(), []

    def run(experts, tokens):
        first = (len(experts), tokens) not in compiled
        compiled.add((len(experts), tokens))
        asked.append(tokens)
        return 1e7 if first else us * len(experts)

    cost = calibration._curve(run, np.arange(4))
    assert sorted(set(asked)) == measured
    assert cost.of(np.array([64]))[0] == pytest.approx(us, rel=0.3)


def test_experts_are_timed_on_the_model_s_own_type(monkeypatch):
    """Hidden states in fp32 beside coded experts of a bf16 model: other kernels, many times slower on a GPU."""
    seen = set()
    launch, run = LayerCache.launch, CpuExecutor.run

    def launched(self, x, *args):
        seen.add(("device", x.dtype))
        return launch(self, x, *args)

    def ran(self, store, x, *args):
        seen.add(("cpu", x.dtype))
        return run(self, store, x, *args)

    monkeypatch.setattr(LayerCache, "launch", launched)
    monkeypatch.setattr(CpuExecutor, "run", ran)
    model = zoo.build("qwen3_moe", dtype=torch.bfloat16)
    with helpers.patched(model, device="emulated", gpu_memory=0.5, expert_format="int8", keep_original=True):
        assert seen == {("device", torch.bfloat16), ("cpu", torch.bfloat16)}
