"""Foresees experts of the next layer while one runs, and offers those that are worth an upload to the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from moebius.hf_plugin.running.dispatcher import Tier
from moebius.hf_plugin.running.host_tier import HostTier
from moebius.predictors.forecaster import NO_SCORES, Forecaster, Habits, Hint
from moebius.predictors.routing import MAX_TOKENS, Gate, Offsets, Predictor, Routing
from moebius.predictors.switch import Switch, least_chance

OBSERVED = 8  # one token in so many teaches how hidden states change
_READ_PRICE = 1.0  # of a wrong read of a file, in reads that a layer need not wait for
_LITTLE_US = 1e-3


class Question(NamedTuple):
    """A step that is foreseen."""

    # What the next layer's router says of its tokens: ids [T, k] and, where it gives them, scores [T, E]; else nothing.
    asked: tuple[torch.Tensor, ...]
    took_s: float


class Lookahead:
    """The predictor of a model at work; calls come in the order of the layers.

    Args:
        predictor: what it looks at.
        experts: number of experts of each layer.
        gates: of each layer; a callable gives the gate, or None as long as or because it is not known.
        host: the tier of host memory, if that is a cache of a file.
        habits: of each layer, from a profile; empty to start from nothing.
    """

    def __init__(
        self,
        predictor: Predictor,
        experts: Sequence[int],
        gates: Sequence[Callable[[], Gate | None]],
        host: HostTier | None = None,
        habits: Sequence[Habits] = (),
    ) -> None:
        self._habits = habits
        self._host = host
        self._predictor, self._experts, self._gates = predictor, list(experts), gates
        self._offsets = Offsets(len(experts)) if predictor.residual else None
        self.forecaster: Forecaster | None = None  # made when the number of experts per token is known
        self.switch = Switch()
        self.on: list[bool] = [True] * len(experts)  # whether experts of each layer are prefetched
        self.spent_ms: list[float] = [0.0] * len(experts)
        self._last, self._looking, self._thread = len(experts), False, 0
        self._issued = 0.0  # when the prefetches from the layer before were
        self._gaps: list[float] = []  # microseconds from there to the layer, since the last judgement
        self._spent: list[float] = []  # microseconds of foreseeing a layer, likewise
        self._gap_us = self._cost_us = 0.0  # medians of these, which one call that compiles does not move
        self._misses = 0
        self._judged: np.ndarray = np.zeros(2, np.int64)  # offers that were right, and wrong, so far

    def ask(self, layer: int, x: torch.Tensor, tier: Tier | None) -> Question | None:
        """Ask the next layer's router about hidden states x [T, H], where they are; None for no forecast at all.

        The answer is where x is: it goes to the host with what the host waits for anyway. Later, it would have to wait
        for the experts that the device computes meanwhile.

        Args:
            tier: of the layer, if it has one, by whose costs the predictor rests.
        """
        begun = perf_counter()
        if layer <= self._last:
            self._begin_token(tier)
        elif self._issued:
            self._gaps.append((begun - self._issued) * 1e6)
        self._last, self._issued = layer, 0.0
        if not self._looking:
            return None
        routing = self._route(layer, x) if x.shape[0] <= MAX_TOKENS else None
        if routing is None:
            return Question((), perf_counter() - begun)
        asked = (routing.ids,) if routing.scores is None else (routing.ids, routing.scores)
        return Question(tuple(tensor.to(x.device) for tensor in asked), perf_counter() - begun)

    def foresee(self, question: Question, layer: int, ids: np.ndarray, tier: Tier | None) -> None:
        """`layer` routed this step's tokens to `ids` [T, k]; bring in what the next layer is likely to lack.

        Args:
            question: with the answer in host memory.
            tier: of the next layer, None if it has none.
        """
        begun = perf_counter()
        if self.forecaster is None:
            self.forecaster = Forecaster(self._experts, ids.shape[1], 1, MAX_TOKENS, self._predictor.ids)
            for number, habits in enumerate(self._habits):
                self.forecaster.adopt(number, habits)
        target, forecaster = layer + 1, self.forecaster
        hint = hint_of(question.asked)
        if target == len(self._experts):
            forecaster.advance(layer, ids, None, None, 1.0, 0)
        elif tier is not None:
            limit = max(1, int(self._gap_us / max(tier.costs.upload_us, _LITTLE_US)))
            least, cache = least_chance(tier.cache.price), tier.cache.layer(target)
            experts, chances = forecaster.advance(layer, ids, hint, cache.slots(), least, limit)
            if self._works(target):
                if len(experts):
                    cache.prefetch(experts, chances)
                if self._host is not None:
                    self._read_ahead(self._host, forecaster, layer, len(ids))
        elif self._host is not None:
            least, slots = least_chance(_READ_PRICE), self._host.cache.layer(target).slots()
            experts, _ = forecaster.advance(layer, ids, hint, slots, least, self._experts[target])
            if len(experts) and self._works(target):
                self._host.read_ahead(target, experts)
        end = perf_counter()
        took_s = end - begun + question.took_s
        self.spent_ms[layer] += took_s * 1e3
        if len(ids) <= MAX_TOKENS:
            self._issued = end
            self._spent.append(took_s * 1e6)

    def _works(self, layer: int) -> bool:
        return self.switch.awake and self.on[layer]

    def _read_ahead(self, host: HostTier, forecaster: Forecaster, layer: int, tokens: int) -> None:
        chances = forecaster.forecast(layer, tokens)
        if chances is not None:
            likely = np.flatnonzero(chances >= least_chance(_READ_PRICE)).astype(np.int32)
            host.read_ahead(layer + 1, likely[np.argsort(-chances[likely], kind="stable")])

    def missed(self, experts: int) -> None:
        """A step found so many experts absent."""
        self._misses += experts

    def reset_stats(self) -> None:
        """Count anew."""
        self.spent_ms = [0.0] * len(self._experts)
        if self.forecaster is not None:
            self.forecaster.forget_accuracy()

    def layer_stats(self, layer: int) -> dict[str, float]:
        """The predictor's part of `stats.LayerStats`."""
        working = layer > 0 and self._works(layer)
        found: dict[str, float] = {"prefetching": int(working), "predict_ms": self.spent_ms[layer]}
        if self.forecaster is not None:
            accuracy = self.forecaster.accuracy(layer)
            found |= {
                "forecasts": accuracy.forecasts,
                "miscalibrated": accuracy.miscalibrated,
                "predicted": accuracy.predicted,
                "predicted_right": accuracy.predicted_right,
                "predicted_of": accuracy.used,
                "predicted_absent": accuracy.offered,
                "predicted_absent_right": accuracy.offered_right,
            }
        return found

    def notes(self) -> list[str]:
        """Why the predictor rests, if it does."""
        reason = self.switch.reason
        return [] if reason is None else [f"prefetching rests: {reason}"]

    def _begin_token(self, tier: Tier | None) -> None:
        looked, self._looking = self._looking, self.switch.begin_token()
        if self.switch.due and self.forecaster is not None:
            self._judge(self.forecaster, tier)
        thread = threading.get_ident()
        if self.forecaster is not None and (not looked or thread != self._thread):
            self.forecaster.interrupt()  # other tokens came in between
        self._thread = thread

    def _judge(self, forecaster: Forecaster, tier: Tier | None) -> None:
        judged = forecaster.judged()
        right, wrong = (judged - self._judged).tolist()
        if self._spent:
            self._gap_us, self._cost_us = median(self._gaps or [0.0]), median(self._spent) * len(self._experts)
            self._gaps.clear()
            self._spent.clear()
        found = self._stake(tier)
        if found is None:
            return
        misses, price, miss_us, in_time = found
        self.switch.judge(misses, right, wrong, price, max(miss_us, _LITTLE_US), self._cost_us, in_time)
        self._misses, self._judged = 0, judged
        least = least_chance(price)
        self.on = [not precision < least for precision in forecaster.precisions()]  # NaN as long as nothing is known

    def _stake(self, tier: Tier | None) -> tuple[int, float, float, bool] | None:
        """What `Switch.judge` wants to know of misses: their number, the price, microseconds, and whether in time."""
        host = self._host
        reads = 0 if host is None else host.take_misses()
        read_us = 0.0 if host is None else min(host.read_us, self._gap_us)  # one that has begun is waited for less
        if tier is None:
            return None if host is None else (reads, _READ_PRICE, read_us, len(self._experts) > 1)
        price, miss_us = tier.cache.price, tier.costs.cpu.call(np.ones(1))
        in_time = len(self._experts) > 1 and self._gap_us >= tier.costs.upload_us
        if reads:  # some of what the device lacks is not in memory either
            read_us *= min(reads / max(self._misses, 1), 1.0)
            miss_us = miss_us if in_time else 0.0
            price = (price * miss_us + _READ_PRICE * read_us) / max(miss_us + read_us, _LITTLE_US)
            miss_us, in_time = miss_us + read_us, len(self._experts) > 1
        return self._misses, price, miss_us, in_time

    def _route(self, layer: int, x: torch.Tensor) -> Routing | None:
        if self._offsets is not None and self.switch.tokens % OBSERVED == 0:
            self._offsets.observe(layer, x)
        gate = self._gates[layer + 1]() if self._predictor.gate and layer + 1 < len(self._gates) else None
        if gate is None:
            return None
        return gate(x if self._offsets is None else self._offsets.move(layer + 1, x))


def hint_of(answer: Sequence[torch.Tensor]) -> Hint | None:
    """`Question.asked`, in host memory, as the forecaster wants it."""
    if not answer:
        return None
    scores = answer[1].float().numpy() if len(answer) > 1 else NO_SCORES
    return Hint(np.ascontiguousarray(scores), np.ascontiguousarray(answer[0].numpy(), np.int32))
