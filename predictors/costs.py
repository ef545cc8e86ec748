"""What experts will cost on each processor, measured and kept current, and the split that finishes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TINY_US = 1e-3  # below any expert's time, so that ratios stay finite
_MEMORY = 0.05  # weight of a new observation: about the last 20 calls count


@dataclass(slots=True)
class ExpertCost:
    """Microseconds of one expert on n tokens, ``base_us + n * token_us``, with a factor that follows observations."""

    base_us: float
    token_us: float
    factor: float = 1.0

    @classmethod
    def fit(cls, few: int, few_us: float, many: int, many_us: float) -> ExpertCost:
        """The line through two measurements of an expert, at `few` and at `many` tokens."""
        token_us = max(many_us - few_us, 0.0) / (many - few)
        return cls(max(few_us - few * token_us, 0.0), token_us)

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Microseconds of experts with these numbers of tokens, each; zero tokens cost nothing."""
        return np.where(tokens > 0, (self.base_us + tokens * self.token_us) * self.factor, 0.0)

    def observe(self, tokens: np.ndarray, took_us: float) -> None:
        """Experts with these numbers of tokens together took `took_us`."""
        expected = float(self.of(tokens).sum())
        if expected > 0 and took_us > 0:
            self.factor *= 1 + _MEMORY * (min(max(took_us / expected, 0.1), 10.0) - 1)


@dataclass(slots=True)
class CostModel:
    """The three rates that decide where a missing expert is computed.

    Args:
        cpu: cost of an expert on the CPU.
        gpu: cost of a resident expert on the device.
        upload_us: microseconds to copy one expert to the device.
    """

    cpu: ExpertCost
    gpu: ExpertCost
    upload_us: float

    def fetch(self, misses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """Which missing experts to fetch and compute on the device, so that the layer finishes first.

        With f of m misses fetched, heaviest first, the device takes ``max(T(hits), f * upload) + T(fetched)`` and the
        CPU ``T(rest)`` at the same time; the layer takes the longer of the two. Fetching one helps decode only if
        m > upload / cpu cost, which at high hit rates it never does.

        Args:
            misses: tokens of each missing expert, int [m].
            hits: tokens of each resident expert, int [h].

        Returns:
            bool [m], true where the expert should be fetched.
        """
        order = np.argsort(-misses, kind="stable")
        cpu, gpu = self.cpu.of(misses[order]), self.gpu.of(misses[order])
        fetched = np.arange(len(misses) + 1)
        on_cpu = cpu.sum() - np.concatenate([[0.0], np.cumsum(cpu)])
        on_gpu = np.concatenate([[0.0], np.cumsum(gpu)]) + np.maximum(self.gpu.of(hits).sum(), fetched * self.upload_us)
        best = int(np.argmin(np.maximum(on_cpu, on_gpu)))
        chosen = np.zeros(len(misses), bool)
        chosen[order[:best]] = True
        return chosen

    @property
    def price(self) -> float:
        """Cost of an upload in units of what a hit saves, at one token: what an admission must earn.

        Hits are computed beside the misses, so that a hit saves the CPU's whole time for that expert as long as the
        device is not the one that finishes last.
        """
        return self.upload_us / max((self.cpu.base_us + self.cpu.token_us) * self.cpu.factor, TINY_US)

    def to_dict(self) -> dict[str, float]:
        """Microseconds of an upload, its price, and microseconds of an expert on one token and of each further one."""
        experts = {"cpu": self.cpu, "gpu": self.gpu}
        first = {f"{name}_us": float(cost.of(np.ones(1))[0]) for name, cost in experts.items()}
        further = {f"{name}_token_us": cost.token_us * cost.factor for name, cost in experts.items()}
        return {"upload_us": self.upload_us, "price": self.price} | first | further

    def observe_upload(self, took_us: float) -> None:
        """One expert's copy took `took_us`."""
        self.upload_us += _MEMORY * (took_us - self.upload_us)
