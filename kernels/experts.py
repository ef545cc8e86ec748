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

from moebius.kernels.formats import FLOATS, GROUP, SCALES, Coding, coding

RECORD_ALIGNMENT = 64  # bytes: one cache line, so that no two records share one


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

    @property
    def torch_code(self) -> bool:
        """Whether the module's own torch code takes part, so that no compiled kernel can compute these experts."""
        return self.activation.kind == Act.CUSTOM or self.custom is not None or self.post_norm is not None


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


class Part(NamedTuple):
    """Where one tensor lies in a record."""

    offset: int  # bytes from the record's start
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Byte layout ``[gate|up|down|scales|zero points|biases]`` of an expert, the same on every processor.

    Matrices are row-major: gate and up [I, H], down [H, I]. In the float formats parts follow each other without gaps
    and all have the format's dtype. The others (see `moebius.kernels.formats`) store a matrix [n, m] as rows of
    ``g = ceil(m / GROUP)`` groups of codes, padded to whole groups, and a scale for each block of weights
    (parts ``gate_scale`` and so on, [blocks along rows, blocks along columns]), and zero points likewise, uint8:

    - 8-bit codes: uint8 [n, 32 g], as the bits of int8 or of e4m3;
    - 4-bit codes: uint8 [n, 16 g]; byte j of a group's 16 holds weight j in its low half and weight 16 + j in its high
      half; int4 codes without zero points are -8..7, stored plus 8.

    Their biases are fp32, and every part starts at a multiple of `RECORD_ALIGNMENT`. The record is padded to
    `RECORD_ALIGNMENT` bytes in all formats.
    """

    format: str
    hidden: int
    intermediate: int
    gated: bool
    biased: bool

    @classmethod
    def of(cls, spec: ExpertSpec, format: str) -> RecordLayout:
        coding(format)  # raises where there is none
        return cls(format, spec.hidden, spec.intermediate, spec.gated, spec.biased)

    @property
    def coding(self) -> Coding | None:
        """How weights are coded; None in the float formats."""
        return coding(self.format)

    @property
    def code(self) -> str:
        """What a stored weight is: a float format, or the code of its `Coding`."""
        return self.format if self.coding is None else self.coding.code

    @property
    def quantized(self) -> bool:
        return self.coding is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as numbers: the format's own, fp32 for what quantised weights stand for."""
        return FLOATS.get(self.format, torch.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight that is present, in the order of the record."""
        h, i = self.hidden, self.intermediate
        result: dict[str, tuple[int, ...]] = {"gate": (i, h)} if self.gated else {}
        result |= {"up": (i, h), "down": (h, i)}
        if self.biased:
            result |= ({"gate_bias": (i,)} if self.gated else {}) | {"up_bias": (i,), "down_bias": (h,)}
        return result

    def parts(self) -> dict[str, Part]:
        """Every stored tensor, in the order of the record."""
        shapes, coding = self.shapes(), self.coding
        if coding is None:
            return _place([(name, shape, self.dtype) for name, shape in shapes.items()], 1)
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        stored: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            (name, (n, -(-m // GROUP) * GROUP * coding.bits // 8), torch.uint8) for name, (n, m) in matrices.items()
        ]
        stored += [(f"{name}_scale", coding.blocks(shape), SCALES[coding.scale]) for name, shape in matrices.items()]
        if coding.zeros:
            stored += [(f"{name}_zero", coding.blocks(shape), torch.uint8) for name, shape in matrices.items()]
        stored += [(name, shape, torch.float32) for name, shape in shapes.items() if name not in matrices]
        return _place(stored, RECORD_ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Bytes of a record, padding included."""
        last = list(self.parts().values())[-1]
        return _align(last.offset + last.nbytes, RECORD_ALIGNMENT)

    def stored(self, records: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of every part of records (uint8 [..., nbytes], contiguous in the last dimension), [..., *shape]."""
        return {
            name: records[..., part.offset : part.offset + part.nbytes].view(part.dtype).unflatten(-1, part.shape)
            for name, part in self.parts().items()
        }


def _place(tensors: list[tuple[str, tuple[int, ...], torch.dtype]], alignment: int) -> dict[str, Part]:
    parts, end = {}, 0
    for name, shape, dtype in tensors:
        part = Part(_align(end, alignment), shape, dtype)
        parts[name], end = part, part.offset + part.nbytes
    return parts


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
