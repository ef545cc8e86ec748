"""Buffers that a layer's inputs and sum cross through, layer after layer: whoever wrote them last has ended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebius.gpu_cache.step_buffers import StepBuffers
from tests.gpu_cache.fake_driver import FakeDriver


def cross(buffers: StepBuffers, tokens: int) -> None:
    """A step whose inputs and sum must come through as they are."""
    inputs = [torch.randn(tokens, 6).bfloat16(), torch.arange(2 * tokens).view(tokens, 2), torch.rand(tokens, 2)]
    for sent, found in zip(inputs, buffers.to_host(inputs), strict=True):
        assert torch.equal(sent, found)
        assert sent.dtype == found.dtype
    total = buffers.zeros(tokens, 6)
    assert not total.any()
    total += 1
    assert torch.equal(buffers.to_device(total), torch.ones(tokens, 6))


@pytest.mark.parametrize("tokens", [1, 5], ids=["kept", "too long"])
@pytest.mark.parametrize("opened_inside", [True, False])
def test_inference_mode_and_out_again(tokens: int, opened_inside: bool) -> None:
    """Catches buffers that are made in inference mode, where a model is called first, and cannot be written outside."""
    with torch.inference_mode(opened_inside):
        buffers = StepBuffers(FakeDriver(), 64)
    with torch.inference_mode():
        cross(buffers, tokens)
    with torch.no_grad():
        cross(buffers, tokens)
    with torch.inference_mode():
        cross(buffers, tokens)


def test_a_sum_that_is_still_on_its_way() -> None:
    """Catches the next sum written over one that the link still reads: a model on several devices does not wait for
    this one's stream in between."""
    driver = FakeDriver()
    buffers = StepBuffers(driver, 64)
    first = buffers.zeros(1, 4)
    first += 7
    late = driver.stream()
    with driver.on(late):
        there = buffers.to_device(first)
    second = buffers.zeros(1, 4)
    late.synchronize()
    assert torch.equal(there, torch.full((1, 4), 7.0))
    assert not second.any()


def test_tables_of_launches_that_are_late() -> None:
    """Catches a table that is overwritten, here or there, before its launch has read it, memory asked for by a launch,
    and an address that Triton would compile a kernel anew for."""
    driver = FakeDriver()
    buffers, late = StepBuffers(driver, 200), driver.stream()
    calls, rng, read = dict(driver.calls), np.random.default_rng(0), 0

    def launch(there: torch.Tensor, table: np.ndarray) -> None:
        nonlocal read
        assert there.tolist() == table.tolist()
        read += 1

    with driver.on(late):
        for number in range(60):
            table = rng.integers(-9, 9, 1 + number % 17).astype(np.int32)
            there = buffers.send(table)
            assert (there.data_ptr() - buffers._there[2].data_ptr()) % 16 == 0
            late.add(lambda there=there, table=table: launch(there, table))
    late.synchronize()
    assert read == 60
    assert driver.calls.keys() - calls.keys() == {"copy"}
    assert {name: driver.calls[name] for name in calls} == calls


def test_tables_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tables that go on behind those of all steps before, and wait for the device when the buffer is full."""
    driver = FakeDriver()
    buffers, stream, waits = StepBuffers(driver, 64), driver.current_stream(), []
    monkeypatch.setattr(stream, "synchronize", lambda: waits.append(1))
    first = buffers.send(np.arange(9, dtype=np.int32))
    assert not waits
    assert buffers.send(np.arange(5, dtype=np.int32)).data_ptr() == first.data_ptr()
    assert len(waits) == 1, "the buffer was full"
    buffers.to_host([torch.ones(2)])
    assert buffers.send(np.arange(9, dtype=np.int32)).data_ptr() == first.data_ptr()
    assert len(waits) == 2, "that of to_host, which every step makes"


def test_a_table_that_has_no_room() -> None:
    """Catches a prompt's table cut to the buffer."""
    buffers, table = StepBuffers(FakeDriver(), 64), np.arange(300, dtype=np.int32)
    assert buffers.send(table).tolist() == table.tolist()
