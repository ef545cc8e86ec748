"""Ctrl-C at any moment of a step leaves a cache that serves: no slot pinned or loading for ever, no wrong bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from moebius.gpu_cache import cache as cache_module
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.slots import State
from tests.gpu_cache.fake_device import FakeDevice
from tests.gpu_cache.layers import HIDDEN, expected, make_layers, one_token, some

LAYERS = make_layers((6, 4), (2, 2))
X = torch.linspace(-1, 1, HIDDEN)[None]
TRACED = {str(Path(cache_module.__file__).with_name(f"{name}.py")) for name in ("cache", "pool", "slots")}


class Interruption:
    """Raises KeyboardInterrupt before the n-th bytecode that runs in `TRACED`, as a signal handler would."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def step(cache: ExpertCache, device: FakeDevice, layer: int, experts: np.ndarray) -> None:
    """As the dispatcher does it."""
    try:
        slots = cache.layer(layer).lookup(experts)
        hit = slots >= 0
        slots[~hit] = cache.layer(layer).fetch(experts[~hit])
        there = slots >= 0
        launch = cache.layer(layer).launch(X, one_token(experts[there]), slots[there])
        cache.layer(1 - layer).prefetch(some(0, 1))
        assert torch.equal(launch.result(), expected(LAYERS[layer], X, experts[there]))
    finally:
        cache.layer(layer).finish()
    cache.layer(layer).used(experts, hit)
    cache.layer(layer).admit(some(3, 2))


def scenario(cache: ExpertCache, device: FakeDevice) -> None:
    """Hits, demand, prefetches that are used, withdrawn and displaced, admissions."""
    for layer, experts in ((0, some(0, 1)), (1, some(1, 2)), (0, some(0, 2))):
        step(cache, device, layer, experts)
        for copy in device.copies[:1]:
            if copy.ready:
                copy.end()


def interrupt(cache: ExpertCache, device: FakeDevice, moment: int) -> bool:
    former = sys.gettrace()
    sys.settrace(Interruption(moment))
    try:
        scenario(cache, device)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(former)
    return False


def open_cache() -> tuple[ExpertCache, FakeDevice]:
    device = FakeDevice()
    return ExpertCache(device, LAYERS, 4 * LAYERS[0].layout.nbytes), device


def check_that_it_serves(cache: ExpertCache, device: FakeDevice) -> None:
    scenario(cache, device)
    cache.drain()
    [pool] = cache._pools
    assert not (pool.table.state == State.LOADING).any()
    assert (pool.table.pins == 0).all()
    for layer, (*_, records) in enumerate(LAYERS):
        slots = pool.table.lookup(layer, np.arange(len(records)))
        for expert in np.flatnonzero(slots >= 0):
            assert torch.equal(pool.memory[slots[expert]], records[expert])
    assert cache.layer(0).fetch(some(4, 5)).min() >= 0, "every slot of the layer's share can be had"
    cache.layer(0).finish()
    cache.resize(2 * LAYERS[0].layout.nbytes)


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_bytecode(stride, caplog):
    """A slot reserved for a copy that nobody knows of, or a pin that no `finish` takes back."""
    moment = 1
    while True:
        cache, device = open_cache()
        if not interrupt(cache, device, moment):
            break
        check_that_it_serves(cache, device)
        moment += stride
    assert moment > 1000, "the interrupts came"
    assert "starts empty" in caplog.text, "some came at a bad moment"


def test_an_interrupt_of_the_copy_itself(monkeypatch):
    """The device may have begun it: its slot must not be given away before it has ended."""
    cache, device = open_cache()
    copy = device.copy

    def interrupted(*arguments: Any) -> Any:
        copy(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.layer(0).prefetch(some(1))
    monkeypatch.undo()
    (begun,) = device.copies
    slots = cache.layer(0).fetch(some(2))
    assert begun.done()
    launch = cache.layer(0).launch(X, one_token(some(2)), slots)
    assert torch.equal(launch.result(), expected(LAYERS[0], X, some(2)))
