"""Which experts the next layer will need: predictors behind one protocol, and the record of how right they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

Gate = Callable[[torch.Tensor], torch.Tensor]  # a layer's own routing: hidden states [T, H] to ids [T, k]

MAX_TOKENS = 16  # beyond, a layer uses most of its experts, and there is nothing to foresee


class RoutingPredictor(Protocol):
    """Foresees the experts of the next layer of a model."""

    def predict(self, layer: int, x: torch.Tensor) -> np.ndarray | None:
        """Distinct experts (int32) that layer ``layer + 1`` will use, from layer `layer`'s hidden states [T, H].

        None where nothing is foreseen: after the last layer, in long prompts, or where the gate is not known.
        """


class NoPrediction:
    """Foresees nothing."""

    def predict(self, layer: int, x: torch.Tensor) -> np.ndarray | None:
        return None


class NextGate:
    """Applies the next layer's own router to the current hidden states (Eliseev & Mazur, arXiv:2312.17238).

    Args:
        gates: one entry a layer; a callable gives the layer's gate, or None as long as or because it is not known.
    """

    def __init__(self, gates: Sequence[Callable[[], Gate | None]]) -> None:
        self._gates = gates

    def predict(self, layer: int, x: torch.Tensor) -> np.ndarray | None:
        if layer + 1 >= len(self._gates) or not 0 < len(x) <= MAX_TOKENS:
            return None
        gate = self._gates[layer + 1]()
        return None if gate is None else np.unique(gate(x).cpu().numpy()).astype(np.int32)


PREDICTORS = ("next_gate", "none")


@dataclass(slots=True)
class Accuracy:
    """How right one layer's predictions were, counted in distinct experts of a step."""

    predicted: int = 0
    right: int = 0  # predicted and used
    used: int = 0  # in steps that had a prediction
    absent: int = 0  # predicted while not resident
    absent_right: int = 0

    @property
    def recall(self) -> float:
        """Share of the used experts that were foreseen; NaN before the first prediction."""
        return self.right / self.used if self.used else float("nan")

    @property
    def precision_absent(self) -> float:
        """Share of the predicted non-resident experts that were used; NaN before the first."""
        return self.absent_right / self.absent if self.absent else float("nan")

    def record(self, predicted: np.ndarray, resident: np.ndarray, used: np.ndarray) -> None:
        """A step used `used`, of which `predicted` had been foreseen; `resident` (bool) as of the prediction."""
        right = np.isin(predicted, used)
        self.predicted += len(predicted)
        self.right += int(right.sum())
        self.used += len(used)
        self.absent += int((~resident).sum())
        self.absent_right += int((right & ~resident).sum())
