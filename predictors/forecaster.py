"""Foresees the experts of coming layers, with probabilities that mean what they say; learned online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moebius.kernels.numba import foresight
from moebius.kernels.numba.bundle import bundle

NO_SCORES = np.empty((0, 0), np.float32)
_FOLLOWERS = 8
_NO_SLOTS = np.empty(0, np.int32)
# Weights of a router's features before anything is learned: about what three layers of a small trained model teach.
_MARGIN, _CHOSEN, _ASKED = 2.0, 1.5, -1.0


class Hint(NamedTuple):
    """What a router says about tokens that will reach it: the scores of all experts, and those that it chooses."""

    scores: np.ndarray  # float32 [T, E], contiguous, or [0, 0] where it gives none
    ids: np.ndarray  # int32 [T, k], contiguous


class Habits(NamedTuple):
    """The strongest of what a `Forecaster` learned of one layer of E experts, in about 70 E bytes."""

    average: np.ndarray  # recent use, float32 [E]
    bias: np.ndarray  # float32 [E]
    slopes: np.ndarray  # of average use and the router's features, float32 [1 + GATE]
    followers: np.ndarray  # most telling experts after each one in the layer before, and after the token before
    weights: np.ndarray  # uint16 and float16 [2, E of that layer, M]


NO_HINT = Hint(NO_SCORES, np.empty((0, 0), np.int32))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How right the forecasts of one layer were.

    Args:
        forecasts: probabilities given, one for each token and expert.
        predicted: experts that were at least as likely as not, for each token.
        predicted_right: of these, used.
        used: experts used, for each token.
        offered: experts likely enough for a prefetch while they were not resident, once a step.
        offered_right: of these, used.
        miscalibrated: sum over 20 ranges of probability of the distance between expected uses and uses; as a share of
            `forecasts` it is the expected calibration error.
    """

    forecasts: int
    predicted: int
    predicted_right: int
    used: int
    offered: int
    offered_right: int
    miscalibrated: float


class Forecaster:
    """One logistic model for each layer, over ids of past layers and tokens, the layer's own router, or both.

    Of all experts that get a probability near p, a share of about p is used. Nothing is known at first; some thousand
    tokens teach most of it, whatever they are about. With ids, memory is ``16 L E^2`` bytes for E experts in each of L
    layers.

    Args:
        experts: number of experts of each layer.
        top_k: routed experts per token.
        ahead: layers from the last one known to the one foreseen, 1 to 3.
        rows: tokens of a step up to which it is foreseen and learned from.
        ids: whether to look at the experts of three known layers, the token before at the target, and recent use.

    Raises:
        ValueError: `ahead` is not 1, 2 or 3.
    """

    def __init__(self, experts: Sequence[int], top_k: int, ahead: int = 1, rows: int = 16, ids: bool = True) -> None:
        if ahead not in (1, 2, 3):
            raise ValueError(f"ahead={ahead} layers cannot be foreseen; use 1, 2 or 3")
        layers, most = len(experts), max(experts, default=0)
        sources = foresight.LAGS + 1 if ids else 0
        bias = np.zeros((layers, 2, most), np.float32)
        for layer, count in enumerate(experts):
            share = min(top_k / count, 0.99)
            bias[layer, 0] = np.log(share / (1 - share))
        slopes = np.zeros((layers, 2, 1 + foresight.GATE), np.float32)
        slopes[:, 0, 1:] = _MARGIN, _CHOSEN, _ASKED
        self.ahead, self.rows = ahead, rows
        self.experts: list[int] = list(experts)
        self._judged: np.ndarray = np.zeros(2, np.int64)  # before the accuracy was forgotten
        self.state: tuple[np.ndarray, ...] = (  # in the order of foresight.KINDS
            np.array([ahead, rows], np.int64),
            np.array(self.experts, np.int64),
            np.full((layers, rows, top_k), -1, np.int32),
            np.zeros(layers, np.int64),
            np.zeros((layers, sources, most, most), np.float32),
            np.zeros((layers, sources, most), np.float32),
            bias,
            np.full((layers, most), top_k / most if most else 0, np.float32),
            slopes,
            np.zeros((layers, foresight.GATE, rows, most), np.float32),
            np.zeros(layers, np.int64),
            np.zeros((layers, rows, most), np.float32),
            np.zeros(layers, np.int64),
            np.zeros((layers, most), np.bool_),
            np.zeros((layers, foresight.RECORDS)),
            np.zeros((layers, 3, foresight.BINS)),
        )
        self.words: np.ndarray = bundle(self.state, foresight.KINDS)

    def observe(self, layer: int, ids: np.ndarray) -> None:
        """The tokens of a step were routed to `ids` by `layer`, integer [T, k], -1 and E are no expert."""
        foresight.observe(self.words, layer, np.ascontiguousarray(ids, np.int32))

    def hint(self, layer: int, hint: Hint) -> None:
        """What the router of `layer` says beforehand about this step's tokens."""
        foresight.hint(self.words, layer, hint.scores, hint.ids)

    def forecast(self, layer: int, tokens: int = 1) -> np.ndarray | None:
        """After `layer` was observed: the probability that any of this step's tokens uses each expert of a later layer.

        Returns:
            float32 [E], or None after the last layers and for steps of more than `rows` tokens.
        """
        if not self.foresees(layer, tokens):
            return None
        return foresight.chances_of_any(self.words, layer + self.ahead, tokens)

    def foresees(self, layer: int, tokens: int) -> bool:
        """Whether `forecast` says something."""
        return layer + self.ahead < len(self.experts) and 0 < tokens <= self.rows

    def advance(
        self, layer: int, ids: np.ndarray, hint: Hint | None, slots: np.ndarray | None, least: float, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """In one call `observe`, `hint` about layer ``layer + ahead``, and find that layer's absent, likely experts.

        Args:
            ids: of this step's tokens, integer [T, k].
            slots: of each expert of layer ``layer + ahead``, int32 [E]; -1 where it is absent. None for no such layer.
            least: probability from which an expert is named.
            limit: how many are named at most.

        Returns:
            The experts, likeliest first, int32 [n], and the probability of each that any token uses it, float64 [n].

        Raises:
            ValueError: there is no such layer, it has another number of experts, or the hint is about too many tokens.
        """
        scores, chosen = NO_HINT if hint is None else hint
        target = layer + self.ahead
        if slots is not None and (target >= len(self.experts) or len(slots) != self.experts[target]):
            raise ValueError(
                f"slots of {len(slots)} experts were given for layer {target}, but the layers have {self.experts}; "
                "give one of each expert, and None behind the last layer"
            )
        if len(chosen) > self.rows:
            raise ValueError(f"a hint about {len(chosen)} tokens was given; at most {self.rows} are foreseen")
        return foresight.advance(
            self.words, layer, np.ascontiguousarray(ids, np.int32), scores, chosen,
            _NO_SLOTS if slots is None else slots, least, limit,
        )  # fmt: skip

    def interrupt(self) -> None:
        """What comes next does not follow what was observed last."""
        for part in (foresight.TOKENS, foresight.HINTED, foresight.HOLDING, foresight.OFFERS):
            self.state[part].fill(0)

    def habits(self, layer: int) -> Habits:
        """What was learned of `layer`, for `adopt`."""
        count, weights = self.experts[layer], self.state[foresight.WEIGHTS][layer]
        before = max(self.experts[max(layer - self.ahead, 0)], count)
        kept = weights[[0, -1], :before, :count] if len(weights) else np.zeros((2, 0, count), np.float32)
        strongest = np.argsort(-np.abs(kept), axis=2, kind="stable")[..., :_FOLLOWERS]
        return Habits(
            self.state[foresight.AVERAGE][layer, :count].copy(),
            self.state[foresight.BIAS][layer, 0, :count].copy(),
            self.state[foresight.SLOPES][layer, 0].copy(),
            strongest.astype(np.uint16),
            np.take_along_axis(kept, strongest, 2).astype(np.float16),
        )

    def adopt(self, layer: int, habits: Habits) -> None:
        """Start from what another forecaster learned of `layer`, in a model of the same shape."""
        count, weights = self.experts[layer], self.state[foresight.WEIGHTS][layer]
        self.state[foresight.AVERAGE][layer, :count] = habits.average
        self.state[foresight.BIAS][layer, 0, :count] = habits.bias
        self.state[foresight.SLOPES][layer, 0] = habits.slopes
        if len(weights):
            for lag, place in enumerate((0, -1)):
                kept = weights[place, : habits.followers.shape[1], :count]
                np.put_along_axis(kept, habits.followers[lag].astype(np.int64), habits.weights[lag], 1)
        self.state[foresight.HOLDING].fill(0)

    def accuracy(self, layer: int) -> Accuracy:
        """How right the forecasts of `layer` were since `forget_accuracy`."""
        record, bins = self.state[foresight.RECORD][layer], self.state[foresight.CALIBRATION][layer]
        counts: tuple[int, int, int, int, int, int] = tuple(record[: foresight.RECENT].astype(int).tolist())
        return Accuracy(*counts, miscalibrated=float(np.abs(bins[1] - bins[2]).sum()))

    def judged(self) -> np.ndarray:
        """Offered experts that were used, and that were not, in all layers since the beginning, int64 [2]."""
        return self._judged + self._counts()

    def _counts(self) -> np.ndarray:
        offered, right = self.state[foresight.RECORD][:, [foresight.OFFERED, foresight.OFFERED_RIGHT]].sum(0)
        return np.array([right, offered - right], np.int64)

    def precisions(self) -> np.ndarray:
        """Share of each layer's offered experts that were used, of late above all, [L]; NaN before the first."""
        record = self.state[foresight.RECORD]
        with np.errstate(invalid="ignore"):
            shares: np.ndarray = record[:, foresight.RECENT_RIGHT] / record[:, foresight.RECENT]
        return shares

    def forget_accuracy(self) -> None:
        """Count anew; what was learned stays, and so do `precisions`."""
        self._judged = self.judged()
        self.state[foresight.RECORD][:, : foresight.RECENT] = 0
        self.state[foresight.CALIBRATION].fill(0)
