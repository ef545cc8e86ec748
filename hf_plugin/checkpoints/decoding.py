"""The operation that makes a weight of what a quantised checkpoint stores for it, within transformers' loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from moebius.hf_plugin.checkpoints.codes import Method
from moebius.hf_plugin.checkpoints.conversions import ReadWeight
from moebius.hf_plugin.checkpoints.reading import Record, Source, Stored
from moebius.hf_plugin.discovery.adapters import ExpertParams
from moebius.kernels.experts import RecordLayout
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
        self.taker = checkpoint.taker
        self._checkpoint, self._original, self.method, self.packed = checkpoint, original, method, packed
        self.patterns: list[str] = []  # what it collects

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

    def is_read(self, name: str) -> bool:
        """Whether our own threads read a weight."""
        return self._checkpoint.is_read(name)

    def read(self, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> CodedMatrix:
        """The matrix that some tensors stand for, by the ends of their names."""
        assert self.method is not None
        return self._checkpoint.read(self.method, keys, tensors)

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
            self.taker.refuse(kwargs["full_layer_name"], error)
            return {}

    def _convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        collected = {p: tensors if isinstance(tensors, list) else [tensors] for p, tensors in input_dict.items()}
        if not self.taker.wants(model, name):
            return self._assembled(collected, source_patterns, kwargs)
        for each, tensor in self._assembled(collected, source_patterns, kwargs).items():
            self.taker.take(model, each, tensor[0] if isinstance(tensor, list) else tensor)
            self.taker.settle(model, each, kwargs.get("missing_keys"))
        return {}

    def keys_of(self, name: str) -> list[list[dict[str, str]]]:
        """The names of a weight's tensors, by source, by expert, by end of name."""
        return self.grouped(self._checkpoint.keys_of(name), self.patterns)

    def pieces(self, name: str, params: ExpertParams) -> list[CodedPiece]:
        """What files have of a weight of experts."""
        sources, weight, stored = self.keys_of(name), name.rpartition(".")[2], self._checkpoint.stored
        if self.packed:
            rows = params.rows(weight)
            places = {end: stored(key) for end, key in sources[0][0].items()}
            each = {end: place.split(place.shape[1:]) for end, place in places.items()}
            return [
                CodedPiece(self, expert, sources[0][0], {end: found[expert] for end, found in each.items()}, rows)
                for expert in range(params.num_experts)
            ]
        return [
            CodedPiece(self, expert, keys, {end: stored(key) for end, key in keys.items()}, {part: None})
            for part, of_part in zip(params.stacked(weight), sources, strict=True)
            for expert, keys in enumerate(of_part)
        ]

    def _assembled(self, collected: Any, patterns: list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The weight as the model has it, dequantised, and others that are made of the same tensors, by their names."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        tensors = self.grouped(collected, patterns)
        dtype = _dtype(model, name)
        values = [
            [self._value(key, one, dtype) for key, one in zip(ks, ts, strict=True)]
            for ks, ts in zip(self.keys_of(name), tensors, strict=True)
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
        plain = self.method.weight if self.method is not None else "weight"
        # By the file: transformers 5.17 makes floats of e4m3 codes
        if list(tensors) == [plain] and self._checkpoint.stored(keys[plain]).dtype in PLAIN:
            return tensors[plain].to(dtype)
        if next(iter(tensors.values())).ndim > 2 and self.packed:
            count = len(next(iter(tensors.values())))
            rows = [self.read(keys, {end: t[e] for end, t in tensors.items()}) for e in range(count)]
            return torch.stack([matrix.numbers().to(dtype) for matrix in rows]).mT.contiguous()
        return self.read(keys, tensors).numbers().to(dtype)


@dataclass(frozen=True, slots=True)
class CodedPiece:
    """The tensors that stand for a matrix of an expert, or for all rows of a packed weight.

    Args:
        keys: their names, by the ends of these.
        places: where they are.
        rows: the parts of the record that the matrix is, and which of its rows each of them has (None: all).
    """

    operation: Decode
    expert: int
    keys: Mapping[str, str]
    places: Mapping[str, Stored]
    rows: Mapping[str, slice | None]

    @property
    def tensors(self) -> Sequence[Stored]:
        return list(self.places.values())

    def fill(self, held: Record, record: torch.Tensor, source: Source) -> None:
        matrix = self._matrix(source)
        parts = {part: matrix if rows is None else matrix.rows(rows) for part, rows in self.rows.items()}
        held.fill_coded(record, parts)

    def parts(self, layout: RecordLayout) -> Mapping[str, Stored]:
        """Those of a plain matrix of 8-bit codes, which all methods that have them store as records do."""
        (part, rows), *more = self.rows.items()
        codes, *scales = sorted(self.places.values(), key=lambda place: place.nbytes, reverse=True)
        if more or rows is not None or len(scales) != 1 or layout.coding is None or layout.coding.bits != 8:
            return {}
        found, known = {part: codes, f"{part}_scale": scales[0]}, layout.parts()
        same = codes.shape == known[part].shape and scales[0].nbytes == known[f"{part}_scale"].nbytes
        return found if same and codes.dtype.itemsize == 1 else {}

    def check(self, source: Source) -> None:
        self._matrix(source)

    def _matrix(self, source: Source) -> CodedMatrix:
        return self.operation.read(self.keys, {end: source.load(place) for end, place in self.places.items()})


class QuantizedWeight(ReadWeight):
    """Collects the tensors that stand for a weight; those of coded experts are not loaded, since they are read here."""

    __slots__ = ()

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        operation: Any = self.operations[0]
        if not operation.is_read(target_key):
            super().add_tensor(target_key, source_key, source_pattern, future)
        elif isinstance(future, Future):
            future.cancel()  # transformers reads ahead on threads what a checkpoint has quantised


def _dtype(model: PreTrainedModel, name: str) -> torch.dtype | None:
    path, _, weight = name.rpartition(".")
    parameter = getattr(model.get_submodule(path), weight, None)
    return None if parameter is None else parameter.dtype
