"""A model spread over several devices: a cache on each, and every layer uses that of the device it computes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moebius
from moebius.gpu_cache.device import Device
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.hf_plugin.running import tiers
from moebius.hf_plugin.running.layer import PatchedLayer
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt

NAMES = ("one", "two")


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedDevice]:
    """Every third layer is on the second of two emulated devices; what was opened."""
    opened: list[EmulatedDevice] = []

    def open_device(name: str, link: float | None) -> Device:
        device = EmulatedDevice(link)
        device.name = name
        opened.append(device)
        return device

    places = lambda layer: torch.device("meta", int(layer.index % 3 == 1))  # noqa: E731
    monkeypatch.setattr(PatchedLayer, "device", property(places))
    monkeypatch.setattr(tiers, "_cache_device", lambda wanted, place: NAMES[place.index])
    monkeypatch.setattr(tiers, "open_device", open_device)
    return opened


def _runtime(model: PreTrainedModel) -> Any:
    return vars(helpers.experts_modules(model)[0])["_moebius"].runtime


def test_each_layer_uses_the_cache_of_its_device(two_devices: list[EmulatedDevice]) -> None:
    """Catches a prefetch, a lookup or a counter that goes to the wrong device's cache."""
    model = helpers.trained()
    ids, threads = prompt(model), set(threading.enumerate())
    want, tokens = logits(model, ids), greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5, prefetch=True):
        for _ in range(2):
            assert_close(logits(model, ids), want)
            assert greedy(model, ids) == tokens
        runtime, stats = _runtime(model), moebius.stats(model)
        first, second = runtime.tiers[0], runtime.tiers[1]
        assert [runtime.tiers[number] is (first, second)[number % 3 == 1] for number in range(6)] == [True] * 6
        assert [first.cache.layers, second.cache.layers] == [[0, 2, 3, 5], [1, 4]]
        assert all(layer.hits > 0 and layer.uploads > 0 for layer in stats.layers)
        assert not first.cache.counters.uploads[[1, 4]].any()
        assert not second.cache.counters.uploads[[0, 2, 3, 5]].any()
    assert [device.name for device in two_devices] == list(NAMES)
    assert set(threading.enumerate()) <= threads


def test_budgets_and_statistics_are_per_device(two_devices: list[EmulatedDevice]) -> None:
    """Catches a share taken of all experts on every device, which would not fit, and a resize of the first alone."""
    model = helpers.trained()
    ids = prompt(model, 1)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        facts = moebius.stats(model).to_dict()
        each = [(cache["device"], cache["layers"], cache["slots"]) for cache in facts["caches"]]
        assert each == [("one", 4, 64), ("two", 2, 32)]
        assert facts["cache_bytes"] * 2 == facts["expert_bytes"]
        assert "two: 2 layers" in str(moebius.stats(model))
        moebius.resize(model, gpu_memory=1.0)
        assert [cache.slots for cache in moebius.stats(model).caches] == [128, 64]
        assert greedy(model, ids) == want


def test_a_device_that_fails_closes_the_others(
    two_devices: list[EmulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches threads and slots of the first device that outlive a patch which failed on the second."""
    model = zoo.build("qwen3_moe")

    def free_memory(device: EmulatedDevice) -> int:
        return 1 << 30 if device.name == "one" else 0

    monkeypatch.setattr(EmulatedDevice, "free_memory", free_memory)
    with helpers.unchanged(model), pytest.raises(ValueError, match="are free on two"):
        moebius.patch(model, device="emulated", gpu_memory=0.5)


@pytest.mark.parametrize(
    ("wanted", "place", "expected"),
    [
        ("cuda", torch.device("cuda", 1), "cuda:1"),
        ("xpu", torch.device("xpu", 2), "xpu:2"),
        ("cuda:0", torch.device("cuda", 1), "cuda:0"),
        ("cuda", torch.device("cpu"), "cuda:3"),
        ("emulated", torch.device("cpu"), "emulated"),
    ],
)
def test_the_cache_is_where_the_layer_computes(
    wanted: str, place: torch.device, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hidden states and outputs that cross between GPUs in every layer."""
    monkeypatch.setattr(tiers, "full_name", lambda name: {"cuda": "cuda:3"}.get(name, name))
    assert tiers._cache_device(wanted, place) == expected


def test_a_layer_computes_where_the_weights_beside_its_experts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches experts that were loaded into host memory and count as a layer on the CPU, whatever device_map says."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="cpu"):
        [experts, *_] = helpers.experts_modules(model)
        layer = vars(experts)["_moebius"]
        assert layer.device == torch.device("cpu")
        with monkeypatch.context() as moved:
            moved.setitem(layer._parent().gate._parameters, "weight", torch.nn.Parameter(torch.empty(1, device="meta")))
            moved.setattr(layer.held, "_devices", {"gate_up_proj": torch.device("cuda", 1)})
            assert layer.device == torch.device("cuda", 1), "no other weight says so"


def test_a_model_that_accelerate_has_dispatched() -> None:
    """Catches hooks that copy experts, trip over their placeholders, or do not survive unpatch."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = helpers.trained()
    ids, before = prompt(model), helpers.weights(model)
    want = greedy(model, ids)
    for block in model.model.layers:  # what dispatch_model does with a device_map over several devices
        add_hook_to_module(block, AlignDevicesHook("cpu", io_same_device=True, place_submodules=True))
    with patched(model, device="emulated", gpu_memory=0.5):
        assert greedy(model, ids) == want
        assert all(p.device.type == "meta" for m in helpers.experts_modules(model) for p in m.parameters())
    assert greedy(model, ids) == want
    remove_hook_from_module(model, recurse=True)
    helpers.assert_same_weights(model, before)
