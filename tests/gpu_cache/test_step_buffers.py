"""Buffers that a layer's inputs and sum cross through, layer after layer: whoever wrote them last has ended."""

from __future__ import annotations

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
