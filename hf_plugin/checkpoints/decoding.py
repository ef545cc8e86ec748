"""The operation that makes a weight of what a quantised checkpoint stores for it, within transformers' loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from moebius.hf_plugin.checkpoints.codes import Method
from moebius.hf_plugin.discovery.adapters import ExpertParams
from moebius.kernels.packing import CodedMatrix

if TYPE_CHECKING:
    from moebius.hf_plugin.checkpoints.quantized import QuantizedCheckpoint

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Decode(ConversionOps):
    """Makes a weight of the tensors that stand for it, or hands them over.

    Args:
        original: the conversion that puts a weight together from others; None where one tensor is one weight.
        method: how quantised ones are stored; None where they never are.
        packed: one tensor holds all experts.
    """

    supports_many_to_many = True

    def __init__(
        self, checkpoint: QuantizedCheckpoint, original: WeightConverter | None, method: Method | None, packed: bool
    ) -> None:
        self.hf_quantizer = checkpoint  # tells transformers to leave the tensors' dtypes alone
        self._checkpoint, self._original, self.method, self.packed = checkpoint, original, method, packed

    def __deepcopy__(self, memo: dict[int, Any]) -> Decode:
        """Itself: transformers copies conversions for every weight."""
        return self

    def grouped(self, collected: Mapping[str, Sequence[Any]], patterns: Sequence[str]) -> list[list[dict[str, Any]]]:
        """What was collected, by source, by expert, by end of name."""
        count = len(self._original.source_patterns) if self._original is not None else 1
        each = len(patterns) // count
        result = []
        for first in range(0, len(patterns), each):
            mine = patterns[first : first + each]
            ends = self._ends(mine)
            number = max(len(collected.get(pattern, ())) for pattern in mine)
            result.append(
                [
                    {end: collected[p][i] for p, end in zip(mine, ends, strict=True) if i < len(collected.get(p, ()))}
                    for i in range(number)
                ]
            )
        return result

    def _ends(self, patterns: Sequence[str]) -> list[str]:
        if self.method is None:
            return ["weight"] * len(patterns)
        known = [*self.method.names, self.method.weight]
        return [max((end for end in known if p.endswith(end)), key=len) for p in patterns]

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        try:
            return self._convert(input_dict, source_patterns, kwargs)
        except (ValueError, RuntimeError, KeyError) as error:
            self._checkpoint.refuse(kwargs["full_layer_name"], error)
            return {}

    def _convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        model, name, taker = kwargs["model"], kwargs["full_layer_name"], self._checkpoint.taker
        collected = {p: tensors if isinstance(tensors, list) else [tensors] for p, tensors in input_dict.items()}
        if not taker.wants(model, name):
            return self._assembled(collected, source_patterns, kwargs)
        weights: dict[str, Any] = {name: None}
        if not taker.has(model, name):
            if self._checkpoint.is_apart(name):
                taker.take_coded(
                    model, name, partial(self._matrices, model, name, *self._sources(collected, source_patterns, name))
                )
            else:
                weights = self._assembled(collected, source_patterns, kwargs)
                for each, tensor in weights.items():
                    taker.take(model, each, tensor[0] if isinstance(tensor, list) else tensor)
        for each in weights:
            taker.settle(model, each, kwargs.get("missing_keys"))
        return {}

    def _sources(self, collected: Any, patterns: list[str], name: str) -> tuple[Any, Any]:
        return self.grouped(collected, patterns), self.grouped(self._checkpoint.keys_of(name, patterns), patterns)

    def _matrices(
        self, model: PreTrainedModel, name: str, tensors: Any, keys: Any, expert: int
    ) -> dict[str, CodedMatrix]:
        """An expert's matrices by the names of `ExpertWeights`."""
        assert self.method is not None
        path, _, weight = name.rpartition(".")
        params = self._params(model.get_submodule(path))
        if not self.packed:
            parts = params.stacked(weight)
            return {
                part: self._checkpoint.read(self.method, keys[i][expert], tensors[i][expert])
                for i, part in enumerate(parts)
            }
        one = {end: tensor[expert] for end, tensor in tensors[0][0].items()}
        matrix = self._checkpoint.read(self.method, keys[0][0], one)
        return {part: matrix.rows(rows) for part, rows in params.rows(weight).items()}

    def _params(self, owner: nn.Module) -> ExpertParams:
        return self._checkpoint.params[owner]

    def _assembled(self, collected: Any, patterns: list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The weight as the model has it, dequantised, and others that are made of the same tensors, by their names."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        tensors, keys = self._sources(collected, patterns, name)
        dtype = _dtype(model, name)
        values = [
            [self._value(key, one, dtype) for key, one in zip(ks, ts, strict=True)]
            for ks, ts in zip(keys, tensors, strict=True)
        ]
        if self._original is None:
            return {name: values[0][0]}
        result: dict[str, Any] = dict(zip(self._original.source_patterns, values, strict=True))
        kwargs = kwargs | {
            "source_patterns": self._original.source_patterns,
            "target_patterns": self._original.target_patterns,
        }
        for operation in self._original.operations:
            result = operation.convert(result, **kwargs)
        prefix, _, suffix = next((name.partition(key) for key in result if key in name), ("", "", ""))
        return {prefix + key + suffix: value for key, value in result.items()}

    def _value(
        self, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
    ) -> torch.Tensor:
        plain = tensors.get(self.method.weight if self.method is not None else "weight")
        if plain is not None and plain.dtype in PLAIN and len(tensors) == 1:
            return plain.to(dtype)
        assert self.method is not None
        if next(iter(tensors.values())).ndim > 2 and self.packed:
            count = len(next(iter(tensors.values())))
            rows = [
                self._checkpoint.read(self.method, keys, {end: t[e] for end, t in tensors.items()})
                for e in range(count)
            ]
            return torch.stack([matrix.numbers().to(dtype) for matrix in rows]).mT.contiguous()
        return self._checkpoint.read(self.method, keys, tensors).numbers().to(dtype)


def _dtype(model: PreTrainedModel, name: str) -> torch.dtype | None:
    path, _, weight = name.rpartition(".")
    parameter = getattr(model.get_submodule(path), weight, None)
    return None if parameter is None else parameter.dtype
