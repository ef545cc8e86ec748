"""Small cached layers whose results tell experts apart."""

from __future__ import annotations

import numpy as np
import torch

from moebius.gpu_cache.cache import CachedLayer
from moebius.gpu_cache.executor import run_reference
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import Routes

HIDDEN = 4


def make_layers(experts: tuple[int, ...] = (6, 4), widths: tuple[int, ...] = (2, 2)) -> list[CachedLayer]:
    """Layers of `experts` experts with `widths` intermediate units; equal widths share a pool."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for count, width in zip(experts, widths, strict=True):
        spec = ExpertSpec(HIDDEN, width)
        layout = RecordLayout.of(spec, "fp32")
        records = torch.randn(count, layout.nbytes // 4, generator=generator).view(torch.uint8)
        layers.append(CachedLayer(spec, layout, records))
    return layers


def some(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def one_token(experts: np.ndarray) -> Routes:
    """One token that uses each expert with weight 1."""
    count = len(experts)
    return Routes(experts, np.arange(count + 1, dtype=np.int32), np.zeros(count, np.int32), np.ones(count, np.float32))


def expected(layer: CachedLayer, x: torch.Tensor, experts: np.ndarray) -> torch.Tensor:
    return run_reference(layer.spec, layer.layout, layer.records, x, one_token(experts), experts)
