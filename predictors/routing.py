"""Which experts coming layers will need: the predictors there are, and what they look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

_FOLLOW = 0.05  # weight of a new offset: about the last 20 count
MAX_TOKENS = 16  # beyond, a layer uses most of its experts, and there is nothing to foresee


class Routing(NamedTuple):
    """What a layer's router says of hidden states [T, H]."""

    ids: torch.Tensor  # integer [T, k]; E is no expert
    scores: torch.Tensor | None  # float [T, E], by which it chooses, where it gives them


Gate = Callable[[torch.Tensor], Routing]  # a layer's own routing


@dataclass(frozen=True, slots=True)
class Predictor:
    """What a predictor looks at; all of them turn that into probabilities by a `forecaster.Forecaster`.

    Args:
        ids: the experts of the last layers and of the token before, and recent use.
        gate: the router of the layer that is foreseen, applied to the current hidden states (Eliseev & Mazur,
            arXiv:2312.17238).
        residual: whether these are first moved by the mean change that they undergo until then, learned online.
    """

    ids: bool = False
    gate: bool = False
    residual: bool = False


PREDICTORS: dict[str, Predictor] = {
    "blend": Predictor(ids=True, gate=True, residual=True),
    "next_gate_residual": Predictor(gate=True, residual=True),
    "next_gate": Predictor(gate=True),
    "ids": Predictor(ids=True),
    "none": Predictor(),
}


class Offsets:
    """The mean change of hidden states from a layer's experts to those of a later one, for each layer, learned online.

    Args:
        layers: number of layers.
        ahead: from one layer to the other.
    """

    def __init__(self, layers: int, ahead: int = 1) -> None:
        self._ahead = ahead
        self._means: list[torch.Tensor | None] = [None] * layers  # over the last observed tokens, fp32 [H]
        self._offsets: list[torch.Tensor | None] = [None] * layers  # fp32 [H], of the layer they lead to

    def observe(self, layer: int, x: torch.Tensor) -> None:
        """Hidden states x [T, H] reached `layer`, in the order of the layers."""
        mean = self._means[layer] = (x[0] if len(x) == 1 else x.mean(0)).float()
        before = self._means[layer - self._ahead] if layer >= self._ahead else None
        if before is None or before.shape != mean.shape:
            return
        change = mean - before.to(mean.device)
        offset = self._offsets[layer]
        self._offsets[layer] = change if offset is None else offset.lerp_(change, _FOLLOW)

    def move(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What hidden states x [T, H], `ahead` layers before, are likely to be at `layer`."""
        offset = self._offsets[layer]
        return x if offset is None else (x + offset.to(x.device)).to(x.dtype)
