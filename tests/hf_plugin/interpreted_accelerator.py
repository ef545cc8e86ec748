"""A whole model on an accelerator over a fake driver, its kernels in Triton's interpreter: all that a run on a GPU does
on the host. Run by `test_triton_models.py` with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import moebius
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.hf_plugin.running import streaming, tiers
from moebius.kernels.routes import Routes
from moebius.kernels.triton.config import DECODE_TOKENS, INTERPRETED
from moebius.predictors.costs import Assignment, CostModel
from tests import zoo
from tests.gpu_cache.fake_driver import FakeDriver
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt

assert INTERPRETED

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # of CUDA


class Device(FakeDriver):
    """Knows its memory from the host's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory: set[int] = set()
        self.launches: list[str] = []

    def empty(self, slots: int, nbytes: int) -> torch.Tensor:
        pool = super().empty(slots, nbytes)
        self.memory.add(pool.untyped_storage().data_ptr())
        return pool

    def check(self, name: str, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """A launch that a GPU would refuse, or compile anew: memory of the host, strides, alignment, an empty grid."""
        self.launches.append(name)
        assert all(0 < count <= limit for count, limit in zip(grid, GRID_LIMITS, strict=False)), f"{name} {grid}"
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        assert len(tensors) >= 3
        for tensor in tensors:
            place = tensor.untyped_storage().data_ptr()
            assert place not in self.buffers | self.registered, f"{name} reads the host's memory"
            assert place in self.memory or tensor.dtype not in (torch.uint8, torch.int32), f"{name} reads no device's"
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 16 == 0, f"{name} is compiled anew"
        assert all(type(arg) in (torch.Tensor, int) for arg in args), "what Triton has to specialise on"


@pytest.fixture(params=[False, True], ids=["pinned", "staged"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    driver = Device(refuses=request.param)
    run = InterpretedFunction.run

    def checked(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        driver.check(self.fn.__name__, grid, args)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", checked)
    monkeypatch.setattr(tiers, "open_device", lambda name, link: AcceleratorDevice(driver))
    yield driver
    assert driver.registered == set()


def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers fetch what is absent, leave that to the CPU, leave residents to it as well, and decide themselves."""
    decide, turn = CostModel.assign, cycle(range(4))

    def assign(costs: CostModel, routes: Routes, slots: np.ndarray) -> Assignment:
        there = slots >= 0
        masks = {0: np.ones(len(slots), bool), 1: there, 2: there & (np.arange(len(slots)) % 2 == 0)}
        chosen = masks.get(next(turn))
        return decide(costs, routes, slots) if chosen is None else Assignment.where(chosen, routes, slots)

    monkeypatch.setattr(CostModel, "assign", assign)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_all_that_the_host_does(device: Device, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches what a first run on a GPU would stumble over: a table in the host's memory, a pointer that makes Triton
    compile anew, a slot that is read before its copy, a sum that is read before it crosses."""
    model = zoo.build(name)
    ids, long = prompt(model, 1, 5), prompt(model, 1, DECODE_TOKENS + 2)
    want, long_want, text = logits(model, ids), logits(model, long), greedy(model, ids, max_new_tokens=3)
    in_turn(monkeypatch)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)
    with patched(model, device="emulated", gpu_memory=0.5):
        for _ in range(2):
            assert_close(logits(model, ids), want)
            assert_close(logits(model, long), long_want)
        assert greedy(model, ids, max_new_tokens=3) == text
        sums = moebius.stats(model).sums
        assert sums.hits > 0
        assert sums.misses > 0
        assert sums.uploads > 0
        assert {"intermediate_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"} <= set(device.launches)
