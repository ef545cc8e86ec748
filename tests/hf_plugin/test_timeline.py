"""The timeline of a patched model: what the file holds, that parts of a layer overlap, and the figure drawn from it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moebius
from moebius.cpu_experts.executor import CpuExecutor
from moebius.gpu_cache import executor
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.hf_plugin.running.timeline import (
    BACKGROUND,
    CPU,
    DEMAND,
    DEVICE,
    LAYERS,
    STEPS,
    TRACKS,
    Slice,
    recorded,
    write_trace,
)
from moebius.hf_plugin.tools.overlap import busy, measure, without_experts
from moebius.kernels.routes import Routes
from moebius.predictors.costs import Assignment, CostModel
from tests import zoo
from tests.hf_plugin import helpers


def test_all_three_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that are waited for before the CPU begins, a launch that waits for copies it does not need.

    A resident's launch, a demand copy and the CPU's part meet at a barrier: one after the other they never would.
    """
    model = zoo.build("qwen3_moe")
    ids = helpers.prompt(model, 2, 20)
    want = helpers.logits(model, ids)
    meeting, armed = threading.Barrier(3), threading.Event()

    def meet_in(target: Any, name: str) -> None:
        original, met = getattr(target, name), threading.Event()

        def method(*args: Any, **kwargs: Any) -> Any:
            if armed.is_set() and not met.is_set():
                met.set()
                meeting.wait(timeout=60)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, method)

    meet_in(EmulatedDevice, "_wait_for_link")
    meet_in(CpuExecutor, "run")
    with monkeypatch.context() as computing:
        meet_in(executor, "moe_forward")
        with helpers.patched(model, device="emulated", gpu_memory=0.75, prefetch=False, cache_policy="ema"):
            cache = vars(helpers.experts_modules(model)[0])["_moebius"].runtime.tiers[0].cache
            cache.resize(cache.nbytes)  # is empty then
            cache.layer(0).fetch(np.arange(2, dtype=np.int32))
            cache.drain()
            cache.layer(0).finish()
            computing.setattr(CostModel, "assign", _one_of_each)
            with recorded(model) as timeline:
                armed.set()
                helpers.assert_close(helpers.logits(model, ids), want)
    layer = [one for one in timeline.slices() if one.facts["layer"] == 0]
    first = {track: next(one for one in layer if one.track == track) for track in (CPU, DEVICE, DEMAND)}
    assert max(one.begin for one in first.values()) <= min(one.end for one in first.values())
    whole = next(one for one in layer if one.track == LAYERS and one.name != "wait")
    for one in first.values():
        assert whole.begin <= one.begin
        assert one.end <= whole.end


def _one_of_each(_costs: CostModel, routes: Routes, slots: np.ndarray) -> Assignment:
    """Residents on the device, the first half of the absent ones fetched, the others on the CPU."""
    on_device = slots >= 0
    absent = np.flatnonzero(~on_device)
    on_device[absent[: len(absent) // 2]] = True
    return Assignment.where(on_device, routes, slots)


def test_a_layer_is_recorded_with_its_facts_and_only_while_asked() -> None:
    """Layers without hits and misses, slices that outlive their layer, recording that goes on after the block."""
    model = zoo.build("qwen3_moe")
    ids = helpers.prompt(model, 1, 6)
    with helpers.patched(model, **helpers.EMULATED | {"gpu_memory": 0.25, "cache_policy": "lru", "emulated_link": 1.0}):
        helpers.greedy(model, ids)
        vars(helpers.experts_modules(model)[0])["_moebius"].runtime.tiers[0].cache.drain()
        moebius.reset_stats(model)
        with recorded(model) as timeline:
            helpers.greedy(model, ids)
        stats = moebius.stats(model).to_dict()
        slices = timeline.slices()
        helpers.greedy(model, ids)
        assert timeline.slices() == slices
    layers = [one for one in slices if one.track == LAYERS and one.name != "wait"]
    assert len(layers) == 8 * len(stats["layers"])
    assert sum(one.facts["hits"] for one in layers) == stats["hits"]
    assert sum(one.facts["misses"] for one in layers) == stats["misses"]
    copies = [one for one in slices if one.track in (DEMAND, BACKGROUND)]
    assert 0 < len(copies) == stats["copies"]
    assert sum(one.end - one.begin for one in copies) * 1e6 == pytest.approx(stats["copy_us"], rel=1e-3)
    computed = sum(one.end - one.begin for one in slices if one.track == CPU)
    assert computed * 1e3 == pytest.approx(stats["cpu_ms"], rel=1e-3)
    assert [one for one in slices if one.track == DEVICE]


def test_the_file_is_a_chrome_trace(tmp_path: Path) -> None:
    """An event without a phase, a time below zero, a track without a name."""
    slices = [Slice(LAYERS, "layer 0", 5.0, 5.003, {"hits": 3}), Slice(DEMAND, "expert 1", 5.001, 5.002, {})]
    write_trace(tmp_path / "new" / "trace.json", {"moebius": slices, "cpu": slices[:1]})
    document = json.loads((tmp_path / "new" / "trace.json").read_text())
    events = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == sorted(TRACKS * 2)
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["moebius", "cpu"]
    shown = [e for e in events if e["ph"] == "X"]
    assert len(shown) == 3
    assert {names[e["pid"], e["tid"]] for e in shown} == {LAYERS, DEMAND}
    assert [(e["ts"], e["dur"]) for e in shown[:2]] == [pytest.approx((0.0, 3000.0)), pytest.approx((1000.0, 1000.0))]
    assert shown[0]["args"] == {"hits": 3}


def test_busy_counts_what_overlaps_once_and_within_the_window() -> None:
    slices = [Slice(CPU, "", 0.0, 2.0, {}), Slice(CPU, "", 1.0, 3.0, {}), Slice(DEVICE, "", 0.0, 9.0, {}),
              Slice(CPU, "", 5.0, 8.0, {})]  # fmt: skip
    assert busy(slices, (CPU,), 0.5, 6.0) == pytest.approx(3.5)
    assert busy(slices, (CPU, DEVICE), 0.5, 6.0) == pytest.approx(5.5)
    assert busy(slices, (DEMAND,), 0.0, 9.0) == 0


@pytest.mark.parametrize(("shift", "over"), [(0.0, 1.0), (4.0, 1.5)])
def test_over_bound(shift: float, over: float) -> None:
    """1 where the shorter parts are hidden, more where they run behind the longest."""
    slices = []
    for begin in (0.0, 100.0):
        end = begin + 9.0 + shift
        slices += [Slice(STEPS, "", begin, end, {}), Slice(CPU, "", begin + 1, begin + 9, {}),
                   Slice(DEVICE, "", begin + 1 + 2 * shift, begin + 1 + 2 * shift + 4, {})]  # fmt: skip
    found = measure(slices, empty_s=1.0)
    assert found.over_bound == pytest.approx(over)
    assert (found.cpu_ms, found.device_ms, found.link_ms) == pytest.approx((8e3, 4e3, 0.0))
    with pytest.raises(ValueError, match="no decode steps"):
        measure([one for one in slices if one.track != STEPS], 1.0)


def test_without_experts_nothing_is_computed_and_the_model_recovers() -> None:
    """The empty step must do everything but the experts, and leave nothing behind."""
    model = zoo.build("qwen3_moe")
    ids = helpers.prompt(model, 1, 6)
    with helpers.patched(model, **helpers.EMULATED):
        text = helpers.greedy(model, ids)
        moebius.reset_stats(model)
        with without_experts(model):
            helpers.greedy(model, ids)
        sums = moebius.stats(model).to_dict()
        assert sums["tokens"] == 6 + 7
        assert sums["hits"] + sums["misses"] == 0
        assert helpers.greedy(model, ids) == text
