"""Load a checkpoint straight into the patched state: experts stream from the shards into their stores.

transformers calls a quantizer for every weight that it has read and converted, one at a time. Ours copies expert
weights into the `ExpertStore` of their layer and returns nothing, so that they never become parameters: the peak is the
stores plus one packed tensor. Everything else loads as usual. No trace of a quantizer remains on the model.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebius.hf_plugin.discovery import ExpertsSite, find_sites, verify_once
from moebius.hf_plugin.layer import PatchedLayer
from moebius.hf_plugin.options import Options
from moebius.hf_plugin.patching import check_budget, format_name, make_layers, make_options, start
from moebius.kernels.formats import FLOATS

METHOD = "moebius"


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

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class MoebiusQuantizer(HfQuantizer):
    """Takes expert weights out of transformers' loading; registered for `MoebiusConfig`."""

    quantization_config: MoebiusConfig

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        options = self.quantization_config.options
        with torch.device("cpu"):  # the model is being built on the meta device
            self._sites: list[ExpertsSite] = find_sites(model, loaded=False)
            check_budget(options, self._sites)
            formats = [format_name(site, options) for site in self._sites]
            self._layers: list[PatchedLayer] = list(make_layers(model, self._sites, formats, options))
        self._by_owner = {site.owner: layer for site, layer in zip(self._sites, self._layers, strict=True)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._layer_of(model, param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _IntoStore(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any, **more: Any) -> list[Any]:
        # transformers 5.17 does not pass the model
        for conversion in weight_conversions:
            if any("experts" in pattern for pattern in getattr(conversion, "source_patterns", ())):
                conversion.force_cpu = True  # experts are put together in host memory, wherever the rest goes
        return super().update_weight_conversions(weight_conversions, *model, **more)

    def take(self, model: PreTrainedModel, full_name: str, tensor: torch.Tensor) -> None:
        """Copy one expert tensor into its layer's store."""
        layer = self._layer_of(model, full_name)
        assert layer is not None, full_name
        name = full_name.rpartition(".")[2]
        expected = layer.held.placeholders[name].shape
        if tensor.shape != expected:
            raise ValueError(
                f"the checkpoint's {full_name} has shape {tuple(tensor.shape)}, but the configuration asks for "
                f"{tuple(expected)}: the checkpoint and its config.json do not belong together"
            )
        layer.held.fill(name, tensor)

    def _layer_of(self, model: PreTrainedModel, full_name: str) -> PatchedLayer | None:
        path, _, name = full_name.rpartition(".")
        layer = self._by_owner.get(model.get_submodule(path))
        return layer if layer is not None and name in layer.held.placeholders else None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        for layer in self._layers:
            if absent := ", ".join(sorted(layer.held.absent)):
                raise ValueError(
                    f"the checkpoint has no {absent} for {layer.name!r}: it is incomplete or belongs to another "
                    "architecture"
                )
        verified: set[object] = set()
        for site, layer in zip(self._sites, self._layers, strict=True):
            layer.held.lossless = FLOATS.get(layer.store.layout.format) == site.dtype
            _verify(site, layer, verified)
            layer.install()
        start(model, self._layers, self.quantization_config.options)


class _IntoStore(ConversionOps):
    """The last step of a weight's conversion: into the store, and nothing is left to assign."""

    def __init__(self, quantizer: MoebiusQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        model, missing_keys = kwargs["model"], kwargs.get("missing_keys")
        for name, value in input_dict.items():
            self._quantizer.take(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)  # else it would be initialised at random
        return {}


def _verify(site: ExpertsSite, layer: PatchedLayer, verified: set[object]) -> None:
    """Lend the module its weights for the probe of `verify_once`, one layer of each kind."""
    if not verified or site.kind not in verified:
        originals = dict(site.owner._parameters)
        for name, tensor in layer.held.tensors().items():
            site.owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        try:
            verify_once(site, verified)
        finally:
            site.owner._parameters.update(originals)


def from_pretrained(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model straight into the patched state, with the peak of its stores and one packed tensor.

    Args:
        name_or_path: as in transformers: a folder or the name of a repository.
        kwargs: fields of `moebius.Options`; all else goes to transformers' `from_pretrained`. Only safetensors are
            read.

    Returns:
        A model of the class that its configuration names, as after `moebius.patch`.

    Raises:
        ValueError: the model has no experts that can be taken over, is quantised in a way that is not supported, lacks
            weights, or an option has a bad value.
    """
    options = {name: kwargs.pop(name) for name in Options.__slots__ if name in kwargs}
    forwarded = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code", "subfolder")
    config = kwargs.get("config") or AutoConfig.from_pretrained(
        name_or_path, **{name: kwargs[name] for name in forwarded if name in kwargs}
    )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(
            f"{name_or_path} is quantised with {method}, which moebius.from_pretrained does not read yet; load it with "
            "transformers so that its experts are dequantised (fp32, bf16 or fp16), then moebius.patch(model)"
        )
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], AutoModelForCausalLM)
    return kind.from_pretrained(
        name_or_path, **{"use_safetensors": True, **kwargs}, quantization_config=MoebiusConfig(**options)
    )
