"""Recognise what an experts module does between its projections, by asking it.

A module's own code is evaluated on probe values and compared with every formula of `Activation`, with limits and
slopes taken from the module's own attributes. So a new architecture gets the fast kernels without being listed, and
one that computes something else is noticed and keeps its own torch code (`Act.CUSTOM`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import inf, isfinite

import torch
from torch import nn

from moebius.kernels.experts import Act, Activation
from moebius.kernels.reference import activate

_PROBES = 512
_RANGE = 40.0  # beyond every limit seen in a checkpoint (7 to 30), so that clamping shows
_TOLERANCE = 1e-5


def recognise(apply: Callable[[torch.Tensor], torch.Tensor], gated: bool, module: nn.Module) -> Activation | None:
    """The formula of `apply`, or None where no formula of `Activation` gives its values.

    Args:
        apply: maps [n, 2I] (gates, then ups; [n, I] where ungated) to [n, I].
        gated: whether `apply` takes gates and ups.
        module: whose scalar attributes (and those of its children) are candidates for limits and slopes.
    """
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.rand(2, _PROBES, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * _RANGE
    gate[: _PROBES // 2] /= 8  # half of the probes where activations are curved
    with torch.no_grad():
        expected = apply((torch.cat([gate, up]) if gated else gate)[None])[0]
    scale = expected.abs().max()
    for candidate in _candidates(sorted(_scalars(module))):
        found = activate(candidate, gate, up if gated else None)
        if torch.isfinite(found).all() and (found - expected).abs().max() <= _TOLERANCE * scale:
            return candidate
    return None


def _scalars(module: nn.Module) -> set[float]:
    values = (value for child in module.modules() for value in vars(child).values())
    numbers = (float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    return {v for v in numbers if isfinite(v) and 0 < v < _RANGE}


def _candidates(scalars: list[float]) -> Iterator[Activation]:
    """Formulas from the plainest to the most special."""
    yield from (Activation(kind) for kind in Act if kind not in (Act.CUSTOM, Act.SOFTCAP_SILU))
    slopes, limits = [1.0, 1.702, *scalars], [inf, *scalars]
    for alpha, limit, shift in product(slopes, limits, (0.0, 1.0)):
        yield Activation(Act.SILU, alpha, gate_max=limit, up_max=limit, up_shift=shift)
        yield Activation(Act.SILU, alpha, act_max=limit, up_max=limit, up_shift=shift)
    for kind, limit in product((Act.GELU_TANH, Act.GELU_ERF, Act.RELU, Act.RELU2), scalars):
        yield Activation(kind, gate_max=limit, up_max=limit)
        yield Activation(kind, act_max=limit, up_max=limit)
    yield from (Activation(Act.SOFTCAP_SILU, 1.0, g, up_max=u) for g, u in product(scalars, scalars))
