"""What one routed expert computes: its shape, its activation, and the bytes it is stored in.

An expert maps x [H] to ``down @ a + b_down`` with ``a = activation(gate @ x + b_gate, up @ x + b_up)``;
ungated experts have no gate and ``a = activation(up @ x + b_up)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf, prod
from typing import NamedTuple

import torch

RECORD_ALIGNMENT = 64  # bytes: one cache line, so that no two records share one

FORMATS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Act(IntEnum):
    """Element-wise function of the gate (of `up`, where there is no gate)."""

    SILU = 0  # g * sigmoid(alpha * g)
    GELU_TANH = 1
    GELU_ERF = 2
    RELU = 3
    RELU2 = 4
    SOFTCAP_SILU = 5  # gate_max * tanh(g / gate_max) * sigmoid(alpha * g); up is capped by tanh in the same way
    CUSTOM = 6  # the module's own torch code, `ExpertSpec.custom`


class Activation(NamedTuple):
    """``min(f(min(g, gate_max)), act_max) * (clamp(u, -up_max, up_max) + up_shift)``; without a gate the first factor.

    The defaults and `Act.SILU` give SwiGLU; alpha 1.702, up_shift 1 and a limit of 7 give the form of gpt-oss.
    """

    kind: Act = Act.SILU
    alpha: float = 1.0
    gate_max: float = inf
    act_max: float = inf
    up_max: float = inf
    up_shift: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The mathematics that all experts of one layer share.

    Args:
        hidden: width H of inputs and outputs.
        intermediate: width I between the projections.
        gated: whether there is a gate projection beside `up`.
        biased: whether all projections have biases.
        activation: the recognised activation, or kind `Act.CUSTOM`.
        custom: for `Act.CUSTOM`, maps [n, 2I] (all gates, then all ups; [n, I] where ungated) to [n, I].
        post_norm: applied to each expert's output [n, H] before its routing weight, or None.
    """

    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    activation: Activation = field(default_factory=Activation)
    custom: Callable[[torch.Tensor], torch.Tensor] | None = None
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None


class ExpertWeights(NamedTuple):
    """Views of an expert's weights; absent parts are None. Shapes: [I, H], [I, H], [H, I], [I], [I], [H].

    Where a layer's experts are viewed together, each shape has E in front.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Byte layout ``[gate|up|down|gate_bias|up_bias|down_bias]`` of an expert, the same on every processor.

    Matrices are row-major: gate and up [I, H], down [H, I]. The record is padded to `RECORD_ALIGNMENT` bytes.
    """

    format: str
    hidden: int
    intermediate: int
    gated: bool
    biased: bool

    @classmethod
    def of(cls, spec: ExpertSpec, format: str) -> RecordLayout:
        if format not in FORMATS:
            raise ValueError(f"expert format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
        return cls(format, spec.hidden, spec.intermediate, spec.gated, spec.biased)

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.format]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part that is present, in the order of the record."""
        h, i = self.hidden, self.intermediate
        parts: dict[str, tuple[int, ...]] = {"gate": (i, h)} if self.gated else {}
        parts |= {"up": (i, h), "down": (h, i)}
        if self.biased:
            parts |= ({"gate_bias": (i,)} if self.gated else {}) | {"up_bias": (i,), "down_bias": (h,)}
        return parts

    def offsets(self) -> dict[str, int]:
        """First element (not byte) of each part within a record."""
        offsets, start = {}, 0
        for name, shape in self.shapes().items():
            offsets[name] = start
            start += prod(shape)
        return offsets

    @property
    def nbytes(self) -> int:
        """Bytes of a record, padding included."""
        used = sum(prod(shape) for shape in self.shapes().values()) * self.dtype.itemsize
        return -(-used // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    def view(self, records: torch.Tensor) -> ExpertWeights:
        """Views into records (uint8 [..., nbytes], contiguous in the last dimension): parts [..., shape], no copy."""
        flat, offsets = records.view(self.dtype), self.offsets()
        parts = {
            name: flat[..., offsets[name] : offsets[name] + prod(shape)].unflatten(-1, shape)
            for name, shape in self.shapes().items()
        }
        return ExpertWeights(*(parts.get(name) for name in ExpertWeights._fields))  # type: ignore[arg-type]
