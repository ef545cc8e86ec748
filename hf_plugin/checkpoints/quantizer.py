"""What transformers asks while it loads into the patched state: experts stream from the shards into their stores.

transformers finds out which tensors make which weight, and hands weights to a quantizer one at a time. Ours puts
those of experts into the `ExpertStore` of their layer and returns nothing, so that they never become parameters: the
peak is the stores plus one packed tensor. Matrices that a file has as the records have them, single or packed, are read
by threads of our own (`conversions.ExpertWeight`), or used in the mapped file (`in_place`); those transposed,
interleaved or of another dtype come through transformers. Everything else loads as usual. No trace of a quantizer
remains on the model.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebius.cpu_experts.record_file import RecordFile
from moebius.hf_plugin.checkpoints.conversions import IntoStore, of_experts
from moebius.hf_plugin.checkpoints.files import check_tensors
from moebius.hf_plugin.checkpoints.in_place import into_memory
from moebius.hf_plugin.checkpoints.intake import FromFile, Intake, IntoFile, file_layers
from moebius.hf_plugin.checkpoints.quantized import QuantizedCheckpoint
from moebius.hf_plugin.checkpoints.reading import Matrix, Piece
from moebius.hf_plugin.discovery.gates import parent_of
from moebius.hf_plugin.discovery.sites import ExpertsSite, find_sites, probe_ids, verify_once
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.patching import check_budget, format_name, make_options, start
from moebius.hf_plugin.running import expert_files
from moebius.hf_plugin.running.defaults import default_threads
from moebius.hf_plugin.running.held import HeldWeights
from moebius.hf_plugin.running.layer import PatchedLayer

METHOD = "moebius"
_TO_BE_INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")  # what transformers makes a device_map of


@register_quantization_config(METHOD)
class MoebiusConfig(QuantizationConfigMixin):
    """Loads a model straight into the patched state, as `quantization_config` of any `from_pretrained`.

    >>> AutoModelForCausalLM.from_pretrained(path, quantization_config=moebius.MoebiusConfig(gpu_memory="8GiB"))

    Args:
        options: the fields of `moebius.Options`.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("keep_original"):
            raise ValueError("keep_original has no meaning while loading: the originals are in the checkpoint")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum is closed, its registry is not
        self.options: Options = make_options(options)
        self.into: Path | None = None  # write experts to this file, and leave the model without them
        self.quantized: Mapping[str, Any] | None = None  # the checkpoint's own quantization_config, if it has one
        self.intake: weakref.ref[Intake | FromFile] | None = None  # of the load that is under way

    def abandon(self) -> None:
        """The load has failed: give back what it has opened at once, and not when the garbage collector runs."""
        if self.intake is not None and (intake := self.intake()) is not None:
            intake.abandon()

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class MoebiusQuantizer(HfQuantizer):
    """Takes expert weights out of transformers' loading; registered for `MoebiusConfig`."""

    quantization_config: MoebiusConfig

    def __init__(self, quantization_config: MoebiusConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.quantized is not None:
            self.pre_quantized = True
        self._checkpoint: QuantizedCheckpoint | None = None

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would have accelerate copy weights to and fro; called with the map given and the one inferred."""
        places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
        kinds = {"cuda" if isinstance(place, int) else str(place).partition(":")[0] for place in places}
        if kinds & {"disk", "meta"} or ("cpu" in kinds and len(kinds) > 1):
            raise ValueError(
                f"the device_map puts modules on {', '.join(sorted(kinds))}, so that accelerate would copy weights on "
                "every call; experts need no place on a GPU, so give all other modules one (device_map='cuda:0'), "
                "or none (device_map='cpu')"
            )
        if not places:
            raise ValueError("the device_map is empty: leave it out, or give device_map='cpu'")
        for place in places:
            if place is not None and place not in _TO_BE_INFERRED:
                _check_there(place)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """For device_map="auto": experts take no room on any device."""
        return 0.0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        options, files = self.quantization_config.options, list(kwargs.get("checkpoint_files") or ())
        with torch.device("cpu"):  # the model is being built on the meta device
            file = expert_files.beside(files)
            check_tensors(files, model, file is not None or self.quantization_config.quantized is not None)
            self._sites: list[ExpertsSite] = find_sites(model, loaded=False)
            if (quantized := self.quantization_config.quantized) is not None:
                self._checkpoint = QuantizedCheckpoint(quantized, files, self)
                self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
                formats = self._checkpoint.plan(model, self._sites, options.expert_format == "native")
                self._sites = [replace(site, coded=formats.get(site.name)) for site in self._sites]
            check_budget(options, self._sites)
            self._intake = self._open_intake(self._hold(model, file), files, file)
            self.quantization_config.intake = weakref.ref(self._intake)
        self._verified = set[object]()
        self._keys: dict[str, dict[str, list[str]]] = {}  # of plain weights: name -> pattern -> tensors
        self._being_read: set[str] = set()
        self._folder, self._missing = Path(files[0]).parent if files else Path(), set[str]()
        self._used = expert_files.conversions(files) if file is not None else []

    def _hold(self, model: PreTrainedModel, file: RecordFile | None) -> dict[str, HeldWeights]:
        """What holds the weights of each experts module, by its name; tied modules share it, under one name."""
        paths = {module: path for path, module in model.named_modules()}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weights = {site.name: f"{paths[site.owner]}.{site.params.names[-1]}" for site in self._sites}
        sources = {weight: name for name, weight in weights.items()}
        helds: dict[str, HeldWeights] = {}
        self._held_by_owner: dict[nn.Module, HeldWeights] = {}
        self._weights_of: dict[int, list[str]] = {}  # of all modules that share a `HeldWeights`, by its id
        for site in self._sites:
            name = sources.get(tied.get(weights[site.name], ""), site.name)
            if name not in helds:
                format = _format(site, self.quantization_config.options, name, file)
                helds[name] = HeldWeights(site, format, False)
            held = self._held_by_owner[site.owner] = helds[name]
            names = self._weights_of.setdefault(id(held), [])
            names += [f"{paths[site.owner]}.{weight}" for weight in site.params.names]
        return helds

    def _open_intake(
        self, helds: dict[str, HeldWeights], files: list[str], file: RecordFile | None
    ) -> Intake | FromFile:
        config, layers = self.quantization_config, file_layers(helds)
        threads, verify = config.options.cpu_threads or default_threads(), _weak(self._verify_complete)
        budget = expert_files.budget(config.options, list(layers.values()))
        if file is not None:
            expert_files.checked(file, layers)
            if budget is None:  # else each record is checked when it is read
                file.verify(threads)
            return FromFile(helds, file)
        if config.into is not None:
            return IntoFile(helds, threads, files, verify, config.into, {})
        if budget is None:
            return into_memory(config.options, helds.values(), files)(helds, threads, files, verify)
        path, facts = expert_files.cached(files, layers)
        if path.exists():
            return FromFile(helds, expert_files.open_for(path, layers))
        expert_files.remove_unusable()
        return IntoFile(helds, threads, files, verify, path, facts)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._held(model, param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return IntoStore(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any, **more: Any) -> list[Any]:
        # transformers 5.17 does not pass the model
        if self._checkpoint is not None:
            return self._checkpoint.conversions(weight_conversions, self._sites)
        self._conversions = super().update_weight_conversions(weight_conversions, *model, **more)
        known = {pattern for entry in self._conversions for pattern in getattr(entry, "source_patterns", ())}
        packed = {name for site in self._sites for name in site.params.names if site.params.stacked(name)} - known
        return of_experts(self, self._conversions, sorted(packed))

    def take(self, model: PreTrainedModel, full_name: str, tensor: torch.Tensor) -> None:
        """Take one expert tensor out of the loading."""
        held = self._held(model, full_name)
        assert held is not None, full_name
        self._intake.take(held, full_name.rpartition(".")[2], full_name, tensor)

    def collect(self, full_name: str, patterns: Sequence[str], pattern: str, key: str) -> None:
        """A weight does no more than stack tensors, of which this is one."""
        self._keys.setdefault(full_name, {pattern: [] for pattern in patterns})[pattern].append(key)

    def read(self, model: PreTrainedModel, full_name: str) -> bool:
        """Read a weight of experts from its file, with all others of its module; False where that is not plain."""
        held = self._held(model, full_name)
        if held is None or not self._intake.wants or full_name in self._being_read:
            return held is not None
        path, weights = full_name.rpartition(".")[0], {}
        for name in held.placeholders:
            weight = f"{path}.{name}"
            if weight not in self._being_read and (pieces := self._pieces(held, weight)):
                weights[name] = pieces
                self._being_read.add(weight)
        if weights:
            self._intake.read(held, weights)
        return full_name in self._being_read

    def _pieces(self, held: HeldWeights, full_name: str) -> Sequence[Piece]:
        """What files have of a weight; nothing where they do not have it plain, or coded."""
        if self._checkpoint is not None:
            return self._checkpoint.pieces(full_name)
        return self._stored(held, full_name.rpartition(".")[2], self._keys.pop(full_name, {}))

    def _stored(self, held: HeldWeights, name: str, keys: Mapping[str, Sequence[str]]) -> list[Matrix]:
        """The matrices of all experts in a weight; none where the files do not have them as records do."""
        found = self._intake.tensors
        tensors = [[found[key] for key in of_pattern if key in found] for of_pattern in keys.values()]
        parts, shapes = held.stacked(name), held.layout.shapes()
        if parts and len(tensors) == 1 and [t.shape for t in tensors[0]] == [held.placeholders[name].shape]:
            pieces = tensors[0][0].split(shapes[parts[0]])
            tensors = [pieces[number :: len(parts)] for number in range(len(parts))]
        wanted = [[(held.dtype, shapes[part])] * held.num_experts for part in parts]
        if [[(tensor.dtype, tensor.shape) for tensor in of_part] for of_part in tensors] != wanted:
            return []
        return [
            Matrix(tensor, part, expert)
            for part, of_part in zip(parts, tensors, strict=True)
            for expert, tensor in enumerate(of_part)
        ]

    def refuse(self, full_name: str, error: Exception) -> None:
        """Have the load fail, since a weight cannot be put together."""
        files = self._checkpoint.files_of(full_name) if self._checkpoint is not None else []
        where = ", ".join(files[:3]) or self._folder
        self._intake.refuse(
            ValueError(
                f"{full_name} cannot be put together from the tensors in {where} ({error}): the checkpoint is "
                "incomplete, damaged or belongs to another architecture; download or copy it again"
            )
        )

    def wants(self, model: PreTrainedModel, full_name: str) -> bool:
        """Whether a weight is one of experts."""
        return self._held(model, full_name) is not None

    def settle(self, model: PreTrainedModel, full_name: str, missing: set[str] | None) -> None:
        """Leave empty tensors where weights were, which accelerate may move about, and which are not missing."""
        held = self._held(model, full_name)
        if self._intake.wants:  # else all are there already
            names = [name for name in self._weights_of[id(held)] if name.endswith(f".{full_name.rpartition('.')[2]}")]
        else:
            names = [name for names in self._weights_of.values() for name in names]
        for name in names:
            path, _, weight = name.rpartition(".")
            owner = model.get_submodule(path)
            empty = torch.empty(0, dtype=owner.get_parameter(weight).dtype, device="cpu")
            owner._parameters[weight] = nn.Parameter(empty, requires_grad=False)
            owner._parameters[weight]._is_hf_initialized = True  # type: ignore[union-attr]
        if missing is not None:
            missing.difference_update(names)
            self._missing = missing  # which transformers goes on to change

    def _held(self, model: PreTrainedModel, full_name: str) -> HeldWeights | None:
        path, _, name = full_name.rpartition(".")
        held = self._held_by_owner.get(model.get_submodule(path))
        return held if held is not None and name in held.placeholders else None

    def _cast_renamed(self, model: PreTrainedModel) -> None:
        """transformers 5.17 leaves plain weights of quantised checkpoints in the file's dtype where it renames them."""
        if hasattr(HfQuantizer, "get_new_dtype"):
            return
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            # What is fp32 may be kept so on purpose.
            if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.device.type != "meta":
                parameter.data = parameter.data.to(wanted)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        mine: Any = model
        file = self._intake.finish()
        del self._intake  # which has this and the experts: no cycle
        if self._checkpoint is not None:
            mine._weight_conversions = self._checkpoint.for_saving(mine._weight_conversions)
            self._cast_renamed(model)
        else:
            used = [getattr(entry, "original", entry) for entry in mine._weight_conversions]
            mine._weight_conversions = [
                entry for entry in self._conversions if entry in used or [*entry.source_patterns] in self._used
            ]
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        self._check_complete(model)
        if self.quantization_config.into is not None:
            return
        layers = []
        for index, site in enumerate(self._sites):
            held = self._held_by_owner[site.owner]
            self._verify(site, held)
            layers.append(PatchedLayer(index, site, parent_of(model, site.name), held))
        for layer in layers:
            layer.install()
        start(model, layers, self.quantization_config.options, file)

    def _verify_complete(self, held: HeldWeights) -> None:
        """While others are being read; what needs more weights than the experts' waits until all are there."""
        for site in self._sites:
            tensors = (*site.module.named_parameters(), *site.module.named_buffers())
            others = [tensor for name, tensor in tensors if name.rpartition(".")[2] not in held.placeholders]
            if self._held_by_owner[site.owner] is held and not any(tensor.is_meta for tensor in others):
                self._verify(site, held)

    def _verify(self, site: ExpertsSite, held: HeldWeights) -> None:
        """Lend a module weights for the probe of `verify_once`, one of each kind, of the experts in the probe."""
        if site.kind not in self._verified:
            originals = dict(site.owner._parameters)
            for name, tensor in held.tensors(probe_ids(held.num_experts).unique().tolist()).items():
                site.owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            try:
                verify_once(site, self._verified)
            finally:
                site.owner._parameters.update(originals)

    def _check_complete(self, model: PreTrainedModel) -> None:
        """Refuse weights that transformers has filled at random, with a warning, since no file has them."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in self._missing}
        ignored = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        missing = [
            name
            for name in sorted(self._missing)
            if id(parameters.get(name)) not in loaded and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if missing:
            raise ValueError(
                f"the checkpoint in {self._folder} has no {', '.join(missing[:3])}{', ...' if missing[3:] else ''}: it "
                "is incomplete or belongs to another architecture; download or copy it again"
            )


def _check_there(place: Any) -> None:
    """Raise ValueError where a device of a device_map is none of this machine."""
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"the device_map puts modules on {place}, which is not there ({str(error).splitlines()[0]:.99}): leave it "
            "out, or give device_map='cpu'"
        ) from error


def _weak(method: Callable[[HeldWeights], None]) -> Callable[[HeldWeights], None]:
    """A method that does not keep its object alive: no cycle, which would keep what a load that fails has opened."""
    reference = weakref.WeakMethod(method)

    def call(held: HeldWeights) -> None:
        alive = reference()
        assert alive is not None, "transformers has the quantizer while it loads"
        alive(held)

    return call


def _format(site: ExpertsSite, options: Options, name: str, file: RecordFile | None) -> str:
    """The storage format of a site's experts: the file's, where there is one."""
    if file is None or name not in file.layers:
        return format_name(site, options)
    found = file.layers[name].layout.format
    if options.expert_format not in ("native", found):
        raise ValueError(
            f"{file.path} holds experts in {found}, not in {options.expert_format!r}: leave expert_format out, or "
            f"convert the original checkpoint again (moebius convert SRC DST --format {options.expert_format})"
        )
    return found
