"""What experts will cost on each processor, measured and kept current, and the split that finishes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moebius.kernels.numba.split import assign, costs, finish, note, observe
from moebius.kernels.routes import Routes, room, routes_in, select

TINY_US = 1e-3  # below any expert's time, so that ratios stay finite
KNOTS = np.array([1.0, 4.0, 16.0, 64.0, 256.0])  # numbers of tokens at which curves are known
_MEMORY = 0.05  # weight of a new observation: about the last 20 calls count


@dataclass(slots=True)
class Error:
    """How far predicted times were from measured ones: the mean of |predicted / measured - 1|, of late above all."""

    state: np.ndarray = field(default_factory=lambda: np.zeros(2))  # as `split.observe` has it

    @property
    def mean(self) -> float:
        return float(self.state[0])

    @property
    def seen(self) -> int:
        return int(self.state[1])

    def add(self, predicted: float, measured: float) -> None:
        """Count a prediction; one of nothing, or of what took no time, is none."""
        note(self.state, predicted, measured, _MEMORY)


@dataclass(slots=True)
class ExpertCost:
    """Microseconds of one expert by its number of tokens: a curve that follows observations.

    Args:
        curve: at `KNOTS` tokens, float64, positive and without a fall; straight lines between, and beyond the last.
        start_us: what a call takes beside its experts.
        error: of the calls observed, each predicted before it taught anything.
    """

    curve: np.ndarray
    start_us: float = 0.0
    error: Error = field(default_factory=Error)

    @classmethod
    def measured(cls, tokens: Sequence[int], us: Sequence[float], start_us: float = 0.0) -> ExpertCost:
        """The curve through measurements of an expert at some numbers of tokens, at least two, ascending.

        Measurements that fall are noise: an expert never costs less with more tokens.
        """
        rising = np.maximum.accumulate(np.maximum(us, TINY_US))
        slope = (rising[-1] - rising[-2]) / (tokens[-1] - tokens[-2])
        beyond = np.maximum(KNOTS - tokens[-1], 0.0) * slope
        return cls(np.interp(KNOTS, tokens, rising) + beyond, start_us)

    @classmethod
    def line(cls, first_us: float, further_us: float) -> ExpertCost:
        """`first_us` with one token, `further_us` more with each further one."""
        return cls(first_us + (KNOTS - 1) * further_us)

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Microseconds of experts with these numbers of tokens (int [n]), each; zero tokens cost nothing."""
        return costs(_counts(tokens), KNOTS, self.curve)

    def scaled(self, factor: float) -> ExpertCost:
        """The same curve, `factor` times as high."""
        return ExpertCost(self.curve * factor, self.start_us * factor)

    def call(self, tokens: np.ndarray) -> float:
        """Microseconds of one call with all these experts."""
        return self.start_us + float(self.of(tokens).sum())

    def observe(self, tokens: np.ndarray, took_us: float) -> None:
        """One call with experts of these numbers of tokens took `took_us`: the curve moves there, and not elsewhere."""
        curve, error = self.curve, self.error.state
        self.start_us = observe(_counts(tokens), took_us, _MEMORY, self.start_us, KNOTS, curve, error)


class Assignment(NamedTuple):
    """Where a layer's A active experts are to be computed."""

    on_device: np.ndarray  # bool [A]
    there: np.ndarray  # whether each expert is in a slot, wherever it is computed, bool [A]
    tokens: np.ndarray  # of each expert, int32 [A]
    fetches: np.ndarray  # indices of the device's experts that have to be brought there, heaviest first, [n]
    absent: np.ndarray  # experts that are in no slot, int32 [n]
    residents: int  # the device's others
    hits: int  # token-expert pairs of those that are
    on_cpu: Routes  # the CPU's part

    @classmethod
    def where(cls, on_device: np.ndarray, routes: Routes, slots: np.ndarray) -> Assignment:
        """The one that has these experts (bool [A]) on the device, with `slots` as for `CostModel.assign`."""
        there, tokens = slots >= 0, _counts(routes.counts)
        fetches = np.flatnonzero(on_device & ~there).astype(np.int32)
        heaviest_first = fetches[np.argsort(-tokens[fetches], kind="stable")]
        residents, hits = int((on_device & there).sum()), int(tokens[there].sum())
        absent, on_cpu = routes.experts[~there], select(routes, ~on_device)
        return cls(on_device, there, tokens, heaviest_first, absent, residents, hits, on_cpu)


@dataclass(slots=True)
class CostModel:
    """What decides where a layer's experts are computed.

    Args:
        cpu: cost of an expert on the CPU.
        gpu: cost of a resident expert on the device.
        upload_us: microseconds to copy one expert to the device, beside the CPU's work.
        slowdown: factor by which copies slow the CPU's work down, at least 1: both read the host's memory.
        upload_error: of the copies observed.
    """

    cpu: ExpertCost
    gpu: ExpertCost
    upload_us: float
    slowdown: float = 1.0
    upload_error: Error = field(default_factory=Error)

    def assign(self, routes: Routes, slots: np.ndarray) -> Assignment:
        """Which experts the device should compute, so that the later of both processors is done first.

        The rest is the CPU's, residents too where the device has too many. Absent ones are fetched, the heaviest first,
        and computed as they arrive; that shortens decode only where m absent experts cost more than upload / cpu, which
        at high hit rates they never do. See `moebius.kernels.numba.split`.

        Args:
            routes: of A experts.
            slots: of each active expert, int32 [A]; -1 for those that are not on the device.
        """
        active, mine = len(slots), room(len(routes.tokens))
        flags, lists = np.empty((2, active), np.bool_), np.empty((3, active), np.int32)
        curves = KNOTS, self.cpu.curve, self.gpu.curve
        fetched, absent, residents, hits, *on_cpu = assign(*routes, slots, *curves, *self._rates, flags, lists, *mine)
        (on_device, there), fetches, missing = flags, lists[1, :fetched], lists[2, :absent]
        return Assignment(on_device, there, lists[0], fetches, missing, residents, hits, routes_in(*mine, *on_cpu))

    def finish(self, tokens: np.ndarray, resident: np.ndarray, on_device: np.ndarray) -> float:
        """Microseconds of a layer whose experts run where `on_device` (bool [A]) says."""
        return finish(on_device, _counts(tokens), resident, KNOTS, self.cpu.curve, self.gpu.curve, *self._rates)

    @property
    def _rates(self) -> tuple[float, float, float, float]:
        return self.upload_us, self.slowdown, self.cpu.start_us, self.gpu.start_us

    def observe_cpu(self, tokens: np.ndarray, took_us: float, copying_us: float) -> None:
        """The CPU computed experts of these numbers of tokens, beside demand copies of `copying_us` microseconds.

        Without copies this is the CPU's cost; with them, how much they slow it down.
        """
        if copying_us:
            alone_us = self.cpu.call(tokens)
            beside_us = min(alone_us * self.slowdown, alone_us + copying_us * (1 - 1 / self.slowdown))
            self.cpu.error.add(beside_us, took_us)
            found = slowdown(alone_us, took_us, copying_us)
            self.slowdown += _MEMORY * (found - self.slowdown)
        else:
            self.cpu.observe(tokens, took_us)

    def observe_upload(self, took_us: float) -> None:
        """One expert's copy took `took_us`."""
        self.upload_error.add(self.upload_us, took_us)
        self.upload_us += _MEMORY * (took_us - self.upload_us)

    @property
    def price(self) -> float:
        """Cost of an upload in units of what a hit saves, at one token: what an admission must earn.

        Hits are computed beside the misses, so that a hit saves the CPU's whole time for that expert as long as the
        device is not the one that finishes last; where hits are many it is the CPU's only one.
        """
        return self.upload_us / max(float(self.cpu.curve[0]) + self.cpu.start_us, TINY_US)

    @property
    def crossover(self) -> float:
        """Tokens of an expert from which copying it takes less time than computing it on the CPU; inf for none."""
        slope = (self.cpu.curve[-1] - self.cpu.curve[-2]) / (KNOTS[-1] - KNOTS[-2])
        if self.upload_us <= self.cpu.curve[-1]:
            return float(np.interp(self.upload_us, self.cpu.curve, KNOTS))
        return float(KNOTS[-1] + (self.upload_us - self.cpu.curve[-1]) / slope) if slope > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Microseconds of an upload and of an expert by tokens, an upload's price, the crossover (None: never).

        With them the mean relative error of each, of predictions of late (None before the first).
        """
        curves = {f"{name}_us": cost.curve.tolist() for name, cost in (("cpu", self.cpu), ("gpu", self.gpu))}
        crossover = self.crossover if np.isfinite(self.crossover) else None
        facts: dict[str, Any] = {"upload_us": self.upload_us, "slowdown": self.slowdown, "price": self.price}
        errors = (("cpu", self.cpu.error), ("gpu", self.gpu.error), ("upload", self.upload_error))
        facts |= {f"{name}_error": error.mean if error.seen else None for name, error in errors}
        return facts | {"crossover_tokens": crossover, "tokens": KNOTS.tolist()} | curves


def slowdown(alone_us: float, took_us: float, copying_us: float) -> float:
    """Factor, 1 to 4, by which work that takes `alone_us` was slower while copies of `copying_us` ran beside it."""
    beside = min(copying_us, took_us)
    work_done_beside = max(alone_us - (took_us - beside), TINY_US)
    return min(max(beside / work_done_beside, 1.0), 4.0)


def _counts(tokens: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tokens, np.int32)
