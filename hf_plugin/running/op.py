"""The routed experts of a patched layer as one opaque operator, for the compiler and for autograd.

`torch.compile` sees one node with known shapes instead of Python that it would have to trace; CUDA-graph capture is
told to leave it out, since a replay would skip the CPU's half. A backward pass raises instead of losing gradients.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # id -> the layer whose compute() does the work


@torch.library.custom_op("moebius::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    """Weighted sum of the routed experts' outputs, [T, H] in the dtype of `hidden`.

    Args:
        hidden: [T, H].
        ids: integer [T, k].
        weights: float [T, k].
        layer: id of the patched layer.
    """
    if (found := LAYERS.get(layer)) is None:
        raise RuntimeError(
            "the patched model whose experts this graph calls was dropped or unpatched: keep it, patched, as long as "
            "what was exported, traced or compiled from it is called"
        )
    return found.compute(hidden, ids, weights)


@experts.register_fake
def _(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _backward(*_: Any) -> None:
    raise RuntimeError(
        "a backward pass reached experts patched by Moebius, which computes no gradients; "
        "train the unpatched model: moebius.unpatch(model)"
    )


experts.register_autograd(_backward)
