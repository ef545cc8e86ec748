"""Quantised checkpoints through transformers' loading: experts stay coded, everything else is dequantised.

transformers collects the tensors of each weight by patterns of their names. Here each pattern for a weight also stands
for the tensors that a quantisation method stores for it, so that one operation gets them all: of experts it hands the
codes to their records, of other weights it returns what they are worth. What the files hold is planned from their
headers, before any memory is taken.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moebius.hf_plugin.checkpoints.codes import Method, check, methods
from moebius.hf_plugin.checkpoints.conversions import Taker
from moebius.hf_plugin.checkpoints.decoding import PLAIN, CodedPiece, Decode, QuantizedWeight
from moebius.hf_plugin.checkpoints.reading import Stored, tensors_in
from moebius.hf_plugin.discovery.adapters import ExpertParams
from moebius.hf_plugin.discovery.sites import ExpertsSite
from moebius.kernels.packing import CodedMatrix

logger = logging.getLogger(__name__)

_REMEDY = "download or copy it again"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# How some FP8 releases call their scales (as in transformers' own quantizer)
_FP8_RENAMES = ((r"^(.+)\.scale$", r"\1.weight_scale_inv"), (r"\.qscale_weight$", ".weight_scale_inv"))


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
        self.config, self.taker = config, weakref.proxy(taker)  # which holds this and the model's modules: no cycle
        self.methods = methods(config)
        self._places = tensors_in(files)
        self._keys: dict[str, dict[str, list[str]]] = {}  # target -> pattern -> keys
        # Weights of experts that are read as coded matrices, whatever becomes of these
        self._read: dict[str, tuple[Decode, ExpertParams]] = {}
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
            if not reasons and codings:
                self._read |= {name: (self._operation(name, converters), site.params) for name in names}
                reasons += [method.unkept for method in self.methods if method.unkept is not None]
            if len(codings) > 1:
                reasons.append(f"their matrices differ ({', '.join(sorted(codings))})")
            if native and not reasons and codings:
                formats[site.name] = codings.pop()
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
        """The formats of an expert weight's matrices, or why it is no weight of such ("" if it is not quantised)."""
        operation: Decode | None = self._operation(target, converters)
        if operation is None or operation.method is None:
            return ""
        method = operation.method
        self._check_company(self._keys[target])
        sources = operation.keys_of(target)
        if not all(self._is_coded(method, keys) for weights in sources for keys in weights):
            return ""
        if not operation.packed and len(site.params.stacked(target.rpartition(".")[2])) != len(sources):
            return "their tensors are laid out in another way than the module's"
        if not operation.packed and {len(weights) for weights in sources} != {site.params.num_experts}:
            return "the checkpoint has tensors of experts that compute nothing"
        matrices: dict[Any, CodedMatrix] = {}
        for keys in (keys for weights in sources for keys in weights):
            form = tuple((end, self.stored(key).dtype, self.stored(key).shape) for end, key in keys.items())
            if form not in matrices:
                tensors = {end: torch.empty(shape, dtype=dtype, device="meta") for end, dtype, shape in form}
                matrices[form] = self.read(method, keys, tensors)
                self._check_shape(site.params, target, operation.packed, keys, matrices[form])
        return {matrix.coding.name for matrix in matrices.values()}

    def _check_shape(
        self, params: ExpertParams, target: str, packed: bool, keys: Mapping[str, str], matrix: CodedMatrix
    ) -> None:
        """Refuse a matrix that is none of the module's; gate and up have one shape."""
        inner, outer = params.intermediate, params.hidden
        if target.endswith("down_proj"):
            wanted = [outer, inner]
        else:
            wanted = [inner * len(params.rows(target.rpartition(".")[2])) if packed else inner, outer]
        wanted = [params.num_experts, *wanted] if packed else wanted
        found = [*matrix.codes.shape[:-1], matrix.columns]
        if found != wanted and "weight_shape" not in keys:  # which would say how much of them is padding
            key = next(iter(keys.values()))
            raise ValueError(
                f"{key} in {self._places[key].file} stands for weights of shape {found}, but the configuration asks "
                f"for {wanted}: the checkpoint and its config.json do not belong together, or the file is damaged; "
                + _REMEDY
            )

    def _operation(self, target: str, converters: Mapping[str, WeightConverter]) -> Any:
        """What makes a weight, or None."""
        return next((converters[p].operations[0] for p in self._keys.get(target, {}) if p in converters), None)

    def _is_coded(self, method: Method, keys: Mapping[str, str]) -> bool:
        first = keys.get(method.names[0])
        return first is not None and self.stored(first).dtype not in PLAIN

    def _check_company(self, found: Mapping[str, list[str]]) -> None:
        """Tensors belong together by their place among those of the same kind, so none may be missing."""
        owners = {pattern: [key.rpartition(".")[0] for key in keys] for pattern, keys in found.items()}
        longest = max(owners, key=lambda pattern: len(owners[pattern]))
        for pattern, names in owners.items():
            if len(names) != len(owners[longest]):
                lacking = next(owner for owner in owners[longest] if owner not in names)
                beside = found[longest][owners[longest].index(lacking)]
                raise ValueError(
                    f"the checkpoint has {beside} in {self.stored(beside).file}, but no tensor for {pattern!r} beside "
                    f"it, as others have: it is incomplete or damaged; {_REMEDY}"
                )

    # ---- reading

    def read(self, method: Method, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> CodedMatrix:
        """The matrix that some tensors stand for, by the ends of their names; `keys` are their whole names."""
        end = method.names[0] if method.names[0] in keys else next(iter(keys), "")
        key = keys.get(end, "a weight")
        where = f"{key} in {self._places[key].file}" if key in self._places else key
        tensors = {end: self._as_stored(keys.get(end, ""), tensor) for end, tensor in tensors.items()}
        try:
            matrix = method.read(tensors)
            if not matrix.codes.is_meta:
                check(matrix)
        except KeyError as error:
            raise ValueError(
                f"the checkpoint has {where}, but no {key.removesuffix(end)}{error.args[0]} beside it: it is "
                f"incomplete or damaged; {_REMEDY}"
            ) from None
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"{where} and what belongs to it cannot be read: {error}; {_REMEDY}") from error
        return matrix

    def _as_stored(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """transformers 5.17 loads e4m3 in the model's dtype where its name is the model's; back again loses nothing."""
        stored = self._places[key].dtype if key in self._places else tensor.dtype
        return tensor.to(stored) if stored in _FLOAT8 else tensor

    def keys_of(self, target: str) -> dict[str, list[str]]:
        """The tensors' names of a weight, by pattern."""
        return self._keys.get(target, {})

    def stored(self, key: str) -> Stored:
        """Where a tensor is."""
        return self._places[key]

    def is_read(self, full_name: str) -> bool:
        """Whether a weight of experts is read as coded matrices."""
        return full_name in self._read

    def pieces(self, full_name: str) -> list[CodedPiece]:
        """What files have of a weight of experts; nothing where it is not coded."""
        if full_name not in self._read:
            return []
        operation, params = self._read[full_name]
        return operation.pieces(full_name, params)

    def files_of(self, full_name: str) -> list[str]:
        """The files that have a weight."""
        return sorted({self.stored(key).file for keys in self._keys.get(full_name, {}).values() for key in keys})

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
        operation = Decode(self, original, method, packed)
        result = QuantizedWeight(sources, targets, [operation])
        operation.patterns = result.source_patterns
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
