"""How an experts module of transformers holds its weights and is called.

Two questions per module, answered from its parameters, flags and signature, never from its class name: where the
gate, up and down matrices of expert e are (`ExpertParams`), and what a call passes (`Convention`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from moebius.kernels.experts import ExpertWeights

Parts = tuple[torch.Tensor | None, ...]  # in the order of `ExpertWeights`


@dataclass(frozen=True, slots=True)
class ExpertParams:
    """Where one module keeps the weights of its experts.

    Args:
        names: parameter names in their owner, in its order.
        num_experts: E routed experts.
        hidden: H.
        intermediate: I.
        gated: whether there are gate projections.
        biased: whether there are biases.
        transposed: matrices are stored [in, out] rather than [out, in].
        concatenated: gate and up follow each other (else they alternate row by row).
        flat: one 2-D parameter per projection, [E * I, H] (the down projection transposed likewise).
    """

    names: tuple[str, ...]
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool
    biased: bool = False
    transposed: bool = False
    concatenated: bool = True
    flat: bool = False

    def tensors(self, owner: nn.Module) -> dict[str, torch.Tensor]:
        """The parameters' data by name."""
        return {name: owner._parameters[name].data for name in self.names}  # type: ignore[union-attr]

    def views(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views [E, ...] of all routed experts' weights in those of the module's tensors that are given.

        The names are those of `ExpertWeights`.
        """
        parts = ExpertWeights._make(self._flat(tensors) if self.flat else self._packed(tensors))
        return {name: part for name, part in parts._asdict().items() if part is not None}

    def _flat(self, tensors: dict[str, torch.Tensor]) -> Parts:
        w1, v1, w2 = (
            None if rows is None else rows.view(-1, self.intermediate, self.hidden)
            for rows in map(tensors.get, FLAT_NAMES)
        )
        return w1, v1, None if w2 is None else w2.mT, None, None, None

    def _packed(self, tensors: dict[str, torch.Tensor]) -> Parts:
        first = "gate_up_proj" if self.gated else "up_proj"
        rows, down = tensors.get(first), tensors.get("down_proj")
        if self.transposed:
            rows, down = (None if matrix is None else matrix.mT for matrix in (rows, down))
        gate, up = self._split(rows)
        gate_bias, up_bias = self._split(tensors.get(f"{first}_bias"))
        return gate, up, down, gate_bias, up_bias, tensors.get("down_proj_bias")

    def stacked(self, name: str) -> tuple[str, ...]:
        """The matrices (names of `ExpertWeights`) that follow each other in each expert's rows of a packed tensor.

        Empty where it holds them in another way: transposed, interleaved or flat, or where it holds biases.
        """
        if self.flat or self.transposed or name not in ("gate_up_proj", "up_proj", "down_proj"):
            return ()
        if name == "down_proj":
            return ("down",)
        if not self.gated:
            return ("up",)
        return ("gate", "up") if self.concatenated else ()

    def rows(self, name: str) -> dict[str, slice]:
        """Where each matrix's rows are among those that a packed tensor holds of an expert, seen as [out, in]."""
        if name == "down_proj":
            return {"down": slice(None)}
        if not self.gated:
            return {"up": slice(None)}
        if self.concatenated:
            return {"gate": slice(0, self.intermediate), "up": slice(self.intermediate, None)}
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}

    def surplus(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows of packed tensors beyond the routed experts, which nothing computes with but a checkpoint holds."""
        if self.flat:
            return {}
        return {name: t[self.num_experts :] for name, t in tensors.items() if len(t) > self.num_experts}

    def _split(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if rows is None or not self.gated:
            return None, rows
        rows = rows[: self.num_experts]
        if self.concatenated:
            return rows[:, : self.intermediate], rows[:, self.intermediate :]
        return rows[:, 0::2], rows[:, 1::2]


FLAT_NAMES = ("w1", "v1", "w2")


def expert_params(module: nn.Module) -> tuple[nn.Module, ExpertParams] | None:
    """The owner of the routed experts' parameters (`module` or a child of it) and how it holds them, or None."""
    if (packed := _packed(module)) is not None:
        return module, packed
    num_experts = getattr(module, "num_experts", None)
    if isinstance(num_experts, int):
        for owner in module.children():
            if (flat := _flat(owner, num_experts)) is not None:
                return owner, flat
    return None


def _packed(module: nn.Module) -> ExpertParams | None:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    first = next((name for name in ("gate_up_proj", "up_proj") if name in own), None)
    if first is None or "down_proj" not in own or own[first].ndim != 3 or own["down_proj"].ndim != 3:
        return None
    gated = bool(getattr(module, "has_gate", first == "gate_up_proj"))
    up_shape, down_shape = own[first].shape, own["down_proj"].shape
    rows = 2 if gated else 1
    plain = up_shape[1:] == (rows * down_shape[2], down_shape[1])
    transposed = bool(getattr(module, "is_transposed", not plain))
    hidden, intermediate = (down_shape[2], down_shape[1]) if transposed else (down_shape[1], down_shape[2])
    expected = (hidden, rows * intermediate) if transposed else (rows * intermediate, hidden)
    if tuple(up_shape[1:]) != expected or up_shape[0] < down_shape[0]:
        return None
    biases = (f"{first}_bias", "down_proj_bias")
    known = {first, "down_proj", *biases}
    return ExpertParams(
        tuple(name for name in own if name in known),
        down_shape[0],
        hidden,
        intermediate,
        gated,
        biased=all(name in own for name in biases),
        transposed=transposed,
        concatenated=bool(getattr(module, "is_concatenated", True)),
    )


def _flat(owner: nn.Module, num_experts: int) -> ExpertParams | None:
    shapes = {None if (p := owner._parameters.get(name)) is None else tuple(p.shape) for name in FLAT_NAMES}
    shape = shapes.pop()
    if shapes or shape is None or len(shape) != 2 or shape[0] % num_experts:
        return None
    return ExpertParams(FLAT_NAMES, num_experts, shape[1], shape[0] // num_experts, gated=True, flat=True)


class Convention(Enum):
    """What a call of the experts module passes."""

    ROUTED = "experts(hidden [..., H], ids [T, k], weights [T, k])"
    SCALED_ROWS = "experts(rows [E * T, H]): every expert's inputs, scaled by its score; all-zero rows are not routed"


def convention(module: nn.Module) -> Convention | None:
    """The calling convention of `module`, from its class's signature; None where it is another."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = sum(p.kind in kinds for p in signature.parameters.values()) - 1  # without self
    return {1: Convention.SCALED_ROWS, 3: Convention.ROUTED}.get(taken)
