"""Foresees the experts of coming layers from the ids of past ones: a logistic model per layer, learned online."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moebius.kernels.numba import foresight


class Forecaster(Protocol):
    """Gives calibrated probabilities of what a coming layer will use.

    Of all experts that get a probability near p, a share of about p is used.
    """

    def observe(self, layer: int, ids: np.ndarray) -> None:
        """The tokens of a step were routed to `ids` by `layer`, integer [T, k], distinct in a row; -1 is no expert."""

    def forecast(self, layer: int, tokens: int = 1) -> np.ndarray | None:
        """After `layer` was observed: the probability that any of this step's tokens uses each expert of a later layer.

        Returns:
            float32 [E], or None where nothing can be foreseen.
        """


class IdsForecaster:
    """Logistic regression on the experts of three known layers, the token before at the target, and recent use.

    Memory is ``32 L E^2`` bytes, for E experts in each of L layers. Nothing is known at first; some thousand tokens
    teach most of it, whatever they are about.

    Args:
        experts: number of experts of each layer.
        top_k: routed experts per token.
        ahead: layers from the last one known to the one foreseen, 1 to 3.
        rows: tokens of a step up to which it is foreseen and learned from.

    Raises:
        ValueError: `ahead` is not 1, 2 or 3.
    """

    def __init__(self, experts: Sequence[int], top_k: int, ahead: int = 1, rows: int = 16) -> None:
        if ahead not in (1, 2, 3):
            raise ValueError(f"ahead={ahead} layers cannot be foreseen; use 1, 2 or 3")
        layers, most, sources = len(experts), max(experts, default=0), foresight.LAGS + 1
        bias = np.zeros((layers, 2, most), np.float32)
        for layer, count in enumerate(experts):
            share = min(top_k / count, 0.99)
            bias[layer, 0] = np.log(share / (1 - share))
        self.ahead, self.rows = ahead, rows
        self.experts: list[int] = list(experts)
        self.state: tuple[np.ndarray, ...] = (  # in the order of foresight.STATE
            np.array([ahead, rows], np.int64),
            np.array(self.experts, np.int64),
            np.full((layers, rows, top_k), -1, np.int32),
            np.zeros(layers, np.int64),
            np.zeros((layers, sources, most, most), np.float32),
            np.zeros((layers, sources, most, most), np.float32),
            bias,
            np.full((layers, most), top_k / most if most else 0, np.float32),
            np.zeros((layers, 2), np.float32),
            np.zeros((layers, rows, most), np.float32),
            np.zeros(layers, np.int64),
        )

    def observe(self, layer: int, ids: np.ndarray) -> None:
        """See `Forecaster.observe`."""
        foresight.observe(self.state, layer, np.ascontiguousarray(ids, np.int32))

    def forecast(self, layer: int, tokens: int = 1) -> np.ndarray | None:
        """See `Forecaster.forecast`; None after the last layers and for steps of more than `rows` tokens."""
        if layer + self.ahead >= len(self.experts) or not 0 < tokens <= self.rows:
            return None
        return foresight.chances_of_any(self.state, layer + self.ahead, tokens)
