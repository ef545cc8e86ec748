"""Profiles: what a model's routing is usually like, a few kB a layer, from which cache and predictor start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from moebius.hf_plugin.tools.trace_file import Trace
from moebius.predictors.forecaster import Forecaster, Habits

_FORMAT = "moebius routing profile 1"


@dataclass(frozen=True, slots=True)
class Profile:
    """Routing statistics of a model.

    Args:
        uses: of each layer, the share of tokens that use each expert, float32 [E].
        habits: of each layer, what foretells its experts; empty where nothing was learned.
    """

    uses: list[np.ndarray]
    habits: list[Habits]

    @classmethod
    def of_trace(cls, trace: Trace) -> Profile:
        """The statistics of recorded routing."""
        forecaster = Forecaster([trace.experts] * trace.layers, trace.top_k, rows=1)
        for token in trace.ids:
            for layer in range(trace.layers):
                forecaster.observe(layer, token[layer : layer + 1])
        flat = [trace.ids[:, layer].ravel() for layer in range(trace.layers)]
        uses = [(np.bincount(ids, minlength=trace.experts) / trace.tokens).astype(np.float32) for ids in flat]
        return cls(uses, [forecaster.habits(layer) for layer in range(trace.layers)])

    def check(self, path: str | Path, experts: Sequence[int]) -> None:
        """Raise ValueError unless this is of a model with so many experts in each layer."""
        found = [len(use) for use in self.uses]
        if found != list(experts):
            raise ValueError(
                f"profile {path} is of a model with {_shape(found)}, but this one has {_shape(experts)}; record one "
                "with this model: moebius trace --profile, or moebius.save_profile"
            )

    def save(self, path: str | Path) -> None:
        """Write it as safetensors."""
        tensors = {f"{layer}.use": use.astype(np.float32) for layer, use in enumerate(self.uses)}
        for layer, habits in enumerate(self.habits):
            tensors |= {f"{layer}.{name}": np.ascontiguousarray(value) for name, value in habits._asdict().items()}
        experts = json.dumps([len(use) for use in self.uses])
        save_file(tensors, path, {"format": _FORMAT, "experts": experts})


def _shape(experts: Sequence[int]) -> str:
    counts = sorted(set(experts))
    return f"{len(experts)} layers of {' or '.join(map(str, counts))} experts"


def read_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ValueError: the file is no profile, or a damaged one.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a routing profile; make one with moebius trace --profile")
            experts = json.loads(facts["experts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            uses = [tensors[f"{layer}.use"] for layer in range(len(experts))]
            names = [layer for layer in range(len(experts)) if f"{layer}.bias" in tensors]
            habits = [Habits(*(tensors[f"{layer}.{name}"] for name in Habits._fields)) for layer in names]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a routing profile ({error}); make one with moebius trace --profile") from error
    _check_values(path, experts, uses, habits)
    return Profile(uses, habits)


def _check_values(path: str | Path, experts: list[int], uses: list[np.ndarray], habits: list[Habits]) -> None:
    sound = all(use.shape == (count,) for use, count in zip(uses, experts, strict=True))
    sound &= len(habits) in (0, len(experts)) and all(np.isfinite(use).all() for use in uses)
    for count, part in zip(experts, habits, strict=False):
        sound &= part.average.shape == part.bias.shape == (count,) and part.followers.shape == part.weights.shape
        sound &= part.followers.ndim == 3 and (not part.followers.size or int(part.followers.max()) < count)
        sound &= all(np.isfinite(array).all() for array in part)
    if not sound:
        raise ValueError(f"{path} is a damaged routing profile; make another with moebius trace --profile")


def save_profile(model: nn.Module, path: str | Path) -> None:
    """Write what the patched `model` has learned of its routing, for the option `profile` of later patches.

    Args:
        path: a file beside the checkpoint, say; it takes a few kB a layer.

    Raises:
        ValueError: the model is not patched, or has no cache that learns.
    """
    from moebius.hf_plugin.patching import runtimes

    [runtime] = runtimes(model)
    runtime.profile_now().save(path)
