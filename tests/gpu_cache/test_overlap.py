"""The cache on real threads or streams: results while copies, launches and evictions overlap; everything given back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moebius.gpu_cache.cache import CachedLayer, ExpertCache
from moebius.gpu_cache.device import open_device
from moebius.gpu_cache.executor import run_reference
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import build_routes, select

absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
cuda = pytest.param("cuda", None, marks=[pytest.mark.gpu, absent], id="cuda")


def needs_cuda(test: Callable[[], None]) -> Callable[[], None]:
    return pytest.mark.gpu(absent(test))


EXPERTS, HIDDEN = 16, 256


def make_layers(count: int = 4) -> list[CachedLayer]:
    spec = ExpertSpec(HIDDEN, 512)
    layout = RecordLayout.of(spec, "fp32")
    generator = torch.Generator().manual_seed(0)
    shape = (EXPERTS, layout.nbytes // 4)
    return [
        CachedLayer(spec, layout, (torch.randn(shape, generator=generator) / 16).view(torch.uint8))
        for _ in range(count)
    ]


def open_cache(layers: list[CachedLayer], share: float, name: str = "cuda", link: float | None = None) -> ExpertCache:
    return ExpertCache(open_device(name, link), layers, int(share * sum(layer.records.nbytes for layer in layers)))


def run_steps(cache: ExpertCache, layers: list[CachedLayer], steps: int) -> None:
    """Random layer steps; what the cache computes must equal the host's records through the reference."""
    rng = np.random.default_rng(0)
    for number in range(steps):
        index, tokens = number % len(layers), int(rng.choice([1, 4, 40]))
        ids = np.stack([rng.permutation(EXPERTS)[:4] for _ in range(tokens)])
        routes = build_routes(ids, rng.random(ids.shape, np.float32), EXPERTS)
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(number))
        slots = cache.layer(index).lookup(routes.experts)
        try:
            hit = slots >= 0
            if number % 3 == 0:
                slots[~hit] = cache.layer(index).fetch(routes.experts[~hit])
            there = select(routes, slots >= 0)
            launch = cache.layer(index).launch(x.to(cache.device.torch_device), there, slots[slots >= 0])
            cache.layer((index + 1) % len(layers)).prefetch(rng.permutation(EXPERTS)[:3].astype(np.int32))
        finally:
            cache.layer(index).finish()
        cache.layer(index).used(routes.experts, hit)
        cache.layer(index).admit(routes.experts[slots < 0])  # before the launch has ended
        layer = layers[index]
        correct = run_reference(layer.spec, layer.layout, layer.records, x, there, there.experts)
        torch.testing.assert_close(launch.result().cpu(), correct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("device", "link"), [pytest.param("emulated", None, id="emulated"), pytest.param("emulated", 2.0, id="slow"), cuda]
)
def test_results_while_everything_overlaps(device, link, share):
    """A slot that is read too early or overwritten too soon."""
    layers = make_layers()
    cache = open_cache(layers, share, device, link)
    try:
        run_steps(cache, layers, 60)
        cache.drain()
        assert 0 < cache.resident.sum() <= cache.slots
    finally:
        cache.close()


@needs_cuda
def test_memory_is_given_back():
    gc.collect()
    before = torch.cuda.memory_allocated()
    layers = make_layers()
    for _ in range(20):
        cache = open_cache(layers, 0.5)
        assert layers[0].records.is_pinned()
        run_steps(cache, layers, 8)
        cache.close()
        assert not layers[0].records.is_pinned()
    del cache
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@needs_cuda
def test_refused_pages_do_not_spoil_the_next_kernel():
    """The driver's error of a refused registration surfaces at an unrelated launch."""
    device, host = open_device("cuda"), torch.zeros(8 << 20, dtype=torch.uint8)
    end = host[4 << 20 :]
    assert device.pin(end)
    assert not device.pin(host), "part of it is registered"
    assert torch.ones(8, device="cuda").sum().item() == 8
    device.unpin(end)


@needs_cuda
def test_an_allocation_that_fails_leaves_a_usable_cache():
    layers = make_layers()
    cache = open_cache(layers, 0.25)
    try:
        gc.collect()
        torch.cuda.empty_cache()  # what is left of it cannot be given to others
        hog = torch.empty(torch.cuda.mem_get_info()[0] - (8 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            cache.resize(sum(layer.records.nbytes for layer in layers))
        del hog
        run_steps(cache, layers, 8)
    finally:
        cache.close()
