"""transformers' conversions of tensors into weights, whose results we take where they are weights of experts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter


class Taker(Protocol):
    """Takes weights of experts out of the loading; `quantizer.MoebiusQuantizer`."""

    def wants(self, model: PreTrainedModel, full_name: str) -> bool:
        """Whether a weight is one of experts."""

    def collect(self, full_name: str, patterns: Sequence[str], pattern: str, key: str) -> None:
        """A weight does no more than stack tensors, of which this is one."""

    def read(self, model: PreTrainedModel, full_name: str) -> bool:
        """Read a weight of experts, or have it already; False where it has to be put together."""

    def take(self, model: PreTrainedModel, full_name: str, tensor: torch.Tensor) -> None:
        """Take a weight that has been put together."""

    def settle(self, model: PreTrainedModel, full_name: str, missing: set[str] | None) -> None:
        """A weight has been taken, and is not missing."""

    def refuse(self, full_name: str, error: Exception) -> None:
        """Have the load fail, since a weight cannot be put together."""


class ReadWeight(WeightConverter):
    """A conversion that is left out where our own threads read the weight of experts that it would make.

    Its first operation has the `taker`.
    """

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        operation: Any = self.operations[0]
        taker: Taker = operation.taker
        if taker.read(model, layer_name):
            taker.settle(model, layer_name, loading_info.missing_keys)
            return {}
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadWeight:
        """transformers copies conversions for every tensor: 0.4 s for 1500 of them, patterns included."""
        new = copy.copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new


def of_experts(taker: Taker, conversions: Sequence[Any], packed: Sequence[str]) -> list[Any]:
    """The conversions of a load, of which those of experts' weights give them to `taker`.

    Args:
        conversions: transformers' own.
        packed: names of experts' weights that no conversion makes, since files have them as modules do.
    """
    named = [WeightConverter(name, name, [_Packed()]) for name in packed]
    return [
        *(ExpertWeight(taker, entry) if _makes_experts(entry) else entry for entry in conversions),
        *(ExpertWeight(taker, entry) for entry in named),
    ]


def _makes_experts(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any("experts" in pattern for pattern in entry.source_patterns)


class ExpertWeight(ReadWeight):
    """Stands for the conversion that makes a weight of experts; where it only stacks tensors, they are read instead."""

    __slots__ = ("original", "taker")

    def __init__(self, taker: Taker, original: WeightConverter) -> None:
        sources, targets = list(original._original_source_patterns), list(original._original_target_patterns)
        super().__init__(sources, targets, original.operations, force_cpu=True)  # experts stay in host memory
        for name in ("scope_prefix", "base_model_prefix"):  # transformers 5.17 lacks some
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.operations = [_Guarded(taker, original.operations)]
        self.taker, self.original = taker, original

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        if _stacks(self.original.operations):
            self.taker.collect(target_key, self.source_patterns, source_pattern, source_key)
        super().add_tensor(target_key, source_key, source_pattern, future)


class _Guarded(ConversionOps):
    """Stands for the operations that put a weight of experts together; has the load fail where they do."""

    def __init__(self, taker: Taker, operations: list[ConversionOps]) -> None:
        self.taker, self._operations = taker, operations

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        try:
            for operation in self._operations:
                input_dict = operation.convert(input_dict, source_patterns, target_patterns, **kwargs)
        except (RuntimeError, ValueError, KeyError) as error:
            self.taker.refuse(kwargs["full_layer_name"], error)
            return {_TAKEN: []}
        return input_dict


class _Packed(ConversionOps):
    """Leaves a weight as it is, which a file has packed as the module has."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


_TAKEN = "\0"  # stands in the result of a conversion for a weight that has been taken; part of no name


def _stacks(operations: list[ConversionOps]) -> bool:
    """Whether operations do no more than stack experts, and concatenate the stacks of their matrices."""
    match operations:
        case [_Packed()] | [MergeModulelist(dim=0)] | [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
    return False


class IntoStore(ConversionOps):
    """The last step of a weight's conversion: it is taken, and nothing is left to assign."""

    def __init__(self, taker: Taker) -> None:
        self._taker = taker

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        model, missing_keys = kwargs["model"], kwargs.get("missing_keys")
        taken = _TAKEN in input_dict
        for name, value in ({kwargs["full_layer_name"]: []} if taken else input_dict).items():
            if not taken:
                self._taker.take(model, name, value[0] if isinstance(value, list) else value)
            self._taker.settle(model, name, missing_keys)  # else it would be initialised at random
        return {}
