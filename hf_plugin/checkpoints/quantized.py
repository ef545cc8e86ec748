"""Quantised checkpoints through transformers' loading: experts stay coded, everything else is dequantised.

transformers collects the tensors of each weight by patterns of their names. Here each pattern for a weight also stands
for the tensors that a quantisation method stores for it, so that one operation gets them all: of experts it hands the
codes to their records, of other weights it returns what they are worth. What the files hold is planned from their
headers, before any memory is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moebius.hf_plugin.checkpoints.codes import Method, check, methods
from moebius.hf_plugin.discovery.adapters import ExpertParams
from moebius.hf_plugin.discovery.sites import ExpertsSite
from moebius.kernels.packing import CodedMatrix

logger = logging.getLogger(__name__)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
}  # fmt: skip
# How some FP8 releases call their scales (as in transformers' own quantizer)
_FP8_RENAMES = ((r"^(.+)\.scale$", r"\1.weight_scale_inv"), (r"\.qscale_weight$", ".weight_scale_inv"))


class Taker(Protocol):
    """What takes experts' weights out of the loading; see `loading.MoebiusQuantizer`."""

    def wants(self, model: PreTrainedModel, full_name: str) -> bool:
        """Whether a weight is one of experts."""

    def take(self, model: PreTrainedModel, full_name: str, tensor: torch.Tensor) -> None:
        """Take a weight that is put together already."""

    def take_coded(
        self, model: PreTrainedModel, full_name: str, matrices: Callable[[int], Mapping[str, CodedMatrix]]
    ) -> None:
        """Take a weight as each expert's coded matrices."""

    def has(self, model: PreTrainedModel, full_name: str) -> bool:
        """Whether a weight is there already."""

    def settle(self, model: PreTrainedModel, full_name: str, missing: set[str] | None) -> None:
        """A weight has been taken."""


class QuantizedCheckpoint:
    """The quantised weights of a checkpoint's files.

    Args:
        config: its `quantization_config`.
        files: its safetensors files.
        taker: gets the experts.

    Raises:
        ValueError: the method is not supported.
    """

    def __init__(self, config: Mapping[str, Any], files: Iterable[str], taker: Taker) -> None:
        self.config, self.taker = config, taker
        self.methods = methods(config)
        self._places: dict[str, tuple[str, torch.Tensor]] = {}  # key -> file, a meta tensor of its form
        for file in files:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(key)
                    if (dtype := _DTYPES.get(part.get_dtype())) is not None:
                        self._places[key] = file, torch.empty(part.get_shape(), dtype=dtype, device="meta")
        self._keys: dict[str, dict[str, list[str]]] = {}  # target -> pattern -> keys
        self._kept: set[str] = set()  # weights whose codes are kept
        self.params: dict[nn.Module, ExpertParams] = {}
        self._parameters: list[str] = []
        self._added: list[WeightRenaming] = []
        self.originals: dict[int, WeightConverter] = {}  # by id of the converter that stands for it

    # ---- planning

    def plan(self, model: PreTrainedModel, sites: Sequence[ExpertsSite], native: bool) -> dict[str, str]:
        """The format of each site whose codes can be kept, by its name.

        Args:
            native: whether codes are wanted; if not, none are kept.

        Raises:
            ValueError: tensors are missing or do not belong together; the message names tensor and file.
        """
        self.params = {site.owner: site.params for site in sites}
        self._parameters = [name for name, _ in model.named_parameters()]
        conversions = self.conversions(get_model_conversion_mapping(model), sites)
        self._find_keys(model, conversions)
        converters = {p: c for c in conversions if isinstance(c, WeightConverter) for p in c.source_patterns}
        paths, formats = {module: path for path, module in model.named_modules()}, {}
        lost: dict[str, list[str]] = {}
        for site in sites:
            names = [f"{paths[site.owner]}.{name}" for name in site.params.names if not name.endswith("_bias")]
            found = [self._codings(site, name, converters) for name in names]
            reasons = [reason for reason in found if isinstance(reason, str)]
            codings = {coding for codings in found if not isinstance(codings, str) for coding in codings}
            if len(codings) > 1:
                reasons.append(f"their matrices differ ({', '.join(sorted(codings))})")
            if native and not reasons and codings:
                formats[site.name] = codings.pop()
                self._kept.update(names)
            elif native and any(reasons):
                lost.setdefault(next(filter(None, reasons)), []).append(site.name)
        for reason, where in lost.items():
            logger.warning("experts of %d modules (%s, ...) are dequantised: %s", len(where), where[0], reason)
        return formats

    def _find_keys(self, model: PreTrainedModel, conversions: list[Any]) -> None:
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        meta = model.state_dict()
        self._keys = {}
        for key in sorted(self._places, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
            self._keys.setdefault(target, {}).setdefault(pattern or key, []).append(key)

    def _codings(self, site: ExpertsSite, target: str, converters: dict[str, WeightConverter]) -> set[str] | str:
        """The formats of an expert weight's matrices, or why they cannot be kept ("" if it is not quantised)."""
        found = self._keys.get(target, {})
        operation = next((converters[p].operations[0] for p in found if p in converters), None)
        if not isinstance(operation, _Decode) or operation.method is None:
            return ""
        method, patterns = operation.method, next(converters[p].source_patterns for p in found)
        self._check_company(found)
        sources = operation.grouped({pattern: found.get(pattern, []) for pattern in patterns}, patterns)
        if not all(self._is_coded(method, keys) for weights in sources for keys in weights):
            return ""
        if not operation.packed and len(site.params.stacked(target.rpartition(".")[2])) != len(sources):
            return "their tensors are laid out in another way than the module's"
        if not operation.packed and {len(weights) for weights in sources} != {site.params.num_experts}:
            return "the checkpoint has tensors of experts that compute nothing"
        codings: dict[Any, str] = {}
        for keys in (keys for weights in sources for keys in weights):
            tensors = {end: self._places[key][1] for end, key in keys.items()}
            form = tuple((end, tensor.dtype, tensor.shape) for end, tensor in tensors.items())
            if form not in codings:
                codings[form] = self.read(method, keys, tensors).coding.name
        return method.unkept or set(codings.values())

    def _is_coded(self, method: Method, keys: Mapping[str, str]) -> bool:
        first = keys.get(method.names[0])
        return first is not None and self._places[first][1].dtype not in _PLAIN

    def _check_company(self, found: Mapping[str, list[str]]) -> None:
        """Tensors belong together by their place among those of the same kind, so none may be missing."""
        owners = {pattern: [key.rpartition(".")[0] for key in keys] for pattern, keys in found.items()}
        longest = max(owners, key=lambda pattern: len(owners[pattern]))
        for pattern, names in owners.items():
            if len(names) != len(owners[longest]):
                lacking = next(owner for owner in owners[longest] if owner not in names)
                beside = found[longest][owners[longest].index(lacking)]
                raise ValueError(
                    f"the checkpoint has {beside} in {self._places[beside][0]}, but no tensor for {pattern!r} beside "
                    "it, as others have: it is incomplete or damaged"
                )

    # ---- reading

    def read(self, method: Method, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> CodedMatrix:
        """The matrix that some tensors stand for, by the ends of their names; `keys` are their whole names."""
        key = keys.get(method.names[0], next(iter(keys.values()), "a weight"))
        where = f"{key} in {self._places[key][0]}" if key in self._places else key
        tensors = {end: self._as_stored(keys.get(end, ""), tensor) for end, tensor in tensors.items()}
        try:
            matrix = method.read(tensors)
            if not matrix.codes.is_meta:
                check(matrix)
        except KeyError as error:
            raise ValueError(
                f"the checkpoint has {where}, but no {key.removesuffix(method.names[0])}{error.args[0]} beside it: "
                "it is incomplete or damaged"
            ) from None
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{where} and what belongs to it cannot be read: {error}") from error
        return matrix

    def _as_stored(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """transformers 5.17 loads e4m3 in the model's dtype where its name is the model's; back again loses nothing."""
        stored = self._places[key][1].dtype if key in self._places else tensor.dtype
        return tensor.to(stored) if stored in _FLOAT8 else tensor

    def keys_of(self, target: str, patterns: Sequence[str]) -> dict[str, list[str]]:
        """The tensors' names of a weight, by pattern."""
        found = self._keys.get(target, {})
        return {pattern: found.get(pattern, []) for pattern in patterns}

    def keeps(self, full_name: str) -> bool:
        """Whether an expert weight's codes are kept."""
        return full_name in self._kept

    # ---- transformers' conversions

    def conversions(self, conversions: list[Any], sites: Sequence[ExpertsSite]) -> list[Any]:
        """A model's conversions, so that they collect what the methods store, and end here."""
        result: list[Any] = []
        if any("weight_scale_inv" in method.names for method in self.methods):
            own = any(name.endswith(".scale") for name in self._parameters)
            self._added = [WeightRenaming(*names) for names in (_FP8_RENAMES[1:] if own else _FP8_RENAMES)]
            result += self._added
        result += [self._extended(entry) if isinstance(entry, WeightConverter) else entry for entry in conversions]
        for name in sorted({name for site in sites for name in site.params.names}):
            method = next((m for m in self.methods if m.weight == name), None)
            sources = _longest_first([name, *(method.names if method else ())])
            result.append(self._converter(sources, name, None, method, packed=True))
        for method in self.methods:
            if method.weight == "weight":
                result.append(self._converter(_longest_first(method.names), method.weight, None, method))
        return result

    def for_saving(self, used: Iterable[Any]) -> list[Any]:
        """The model's own conversions among those that were used."""
        return [self.originals.get(id(entry), entry) for entry in used if self._is_own(entry)]

    def _is_own(self, entry: Any) -> bool:
        return id(entry) in self.originals or not (isinstance(entry, WeightConverter) or entry in self._added)

    def _extended(self, original: WeightConverter) -> WeightConverter:
        sources, targets = original._original_source_patterns, original._original_target_patterns
        method = next((m for m in self.methods if all(s.endswith(f".{m.weight}") for s in sources)), None)
        if method is not None:
            names = _longest_first({*method.names, method.weight})
            sources = [source.removesuffix(method.weight) + name for source in sources for name in names]
        return self._converter(list(sources), list(targets), original, method)

    def _converter(
        self,
        sources: list[str],
        targets: list[str] | str,
        original: WeightConverter | None,
        method: Method | None,
        packed: bool = False,
    ) -> WeightConverter:
        operation = _Decode(self, original, method, packed)
        result = WeightConverter(sources, targets, [operation])
        for name in ("scope_prefix", "base_model_prefix"):
            if hasattr(original, name):
                setattr(result, name, getattr(original, name))
        result.force_cpu = packed or any("experts" in source for source in sources)
        if original is not None:
            self.originals[id(result)] = original
        return result


def _longest_first(names: Iterable[str]) -> list[str]:
    """Until transformers 5.18 or so a key belongs to the first pattern that its name begins with."""
    return sorted(names, key=lambda name: (-len(name), name))


class _Decode(ConversionOps):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> _Decode:
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
        model, name, taker = kwargs["model"], kwargs["full_layer_name"], self._checkpoint.taker
        collected = {p: tensors if isinstance(tensors, list) else [tensors] for p, tensors in input_dict.items()}
        if not taker.wants(model, name):
            return self._assembled(collected, source_patterns, kwargs)
        if not taker.has(model, name):
            if self._checkpoint.keeps(name):
                taker.take_coded(
                    model, name, partial(self._matrices, model, name, *self._sources(collected, source_patterns, name))
                )
            else:
                [tensor] = self._assembled(collected, source_patterns, kwargs).values()
                taker.take(model, name, tensor[0] if isinstance(tensor, list) else tensor)
        taker.settle(model, name, kwargs.get("missing_keys"))
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
        """The weight as the model has it, dequantised."""
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
        return result

    def _value(
        self, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
    ) -> torch.Tensor:
        plain = tensors.get(self.method.weight if self.method is not None else "weight")
        if plain is not None and plain.dtype in _PLAIN and len(tensors) == 1:
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


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _dtype(model: PreTrainedModel, name: str) -> torch.dtype | None:
    path, _, weight = name.rpartition(".")
    parameter = getattr(model.get_submodule(path), weight, None)
    return None if parameter is None else parameter.dtype
