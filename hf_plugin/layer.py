"""One patched experts module: what it runs instead of its own forward, and where its weights went.

The module keeps its place, its class and its parameters' names. Its weights live in an `ExpertStore`; in their stead
stand parameters on the meta device, so that counting works and a use that was overlooked raises. Four methods of the
instance are replaced: `forward` and, where the weights were, `_apply` (to, half, ...), `_save_to_state_dict` and
`_load_from_state_dict`. They belong to the layer and not to the module, so that no reference cycle keeps the memory and
the threads of a dropped model.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.adapters import Convention
from moebius.hf_plugin.discovery import ExpertsSite
from moebius.hf_plugin.gates import LayerGate
from moebius.hf_plugin.op import LAYERS, experts
from moebius.kernels.experts import FLOATS, RecordLayout
from moebius.kernels.packing import pack, unpack

if TYPE_CHECKING:
    from moebius.hf_plugin.runtime import ModelRuntime

ATTRIBUTE = "_moebius"  # of a patched experts module: its PatchedLayer
_STATE_METHODS = ("_apply", "_save_to_state_dict", "_load_from_state_dict")
_WEIGHTS = ("_parameters", "_placeholders", "_devices", "_surplus", "_kept", "absent", "lossless", "store")  # of twins
_MISSING = object()
_HOST = torch.empty(0)
_ids = itertools.count()


class PatchedLayer:
    """Runs one experts module's calls through Moebius and holds its weights meanwhile.

    Args:
        index: number of the layer among the model's patched layers.
        site: the module as found.
        parent: the module that holds it, where its router is.
        format: storage format of the experts.
        keep: keep the original tensors, so that unpatching returns them however lossy `format` is.
        twin: an earlier layer with the same parameters (tied weights), whose store serves this one too.
    """

    def __init__(
        self, index: int, site: ExpertsSite, parent: nn.Module, format: str, keep: bool, twin: PatchedLayer | None
    ) -> None:
        self.index, self.name = index, site.name
        self.runtime: ModelRuntime  # set when the model's layers are complete
        self.gate = LayerGate(parent, site.params.num_experts)
        self._convention, self._identity_experts = site.convention, site.identity_experts
        self._arguments = _argument_names(site.module)
        self._module_ref, self._owner_ref = ref(site.module), ref(site.owner)
        self._params, self._dtype = site.params, site.dtype
        self._former_forward = site.module.__dict__.get("forward", _MISSING)
        if twin is None:
            self._take(site, format, keep)
        else:
            for name in _WEIGHTS:
                setattr(self, name, getattr(twin, name))
        self._register()

    def _take(self, site: ExpertsSite, format: str, keep: bool) -> None:
        tensors = site.tensors()
        loaded = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}
        self._parameters: dict[str, nn.Parameter] = {
            name: site.owner.get_parameter(name) if name in loaded else nn.Parameter(torch.empty(0, dtype=site.dtype))
            for name in tensors
        }
        self._placeholders: dict[str, nn.Parameter] = {
            name: _placeholder(tensor.shape, tensor.dtype, self._parameters[name]) for name, tensor in tensors.items()
        }
        self._devices = {name: loaded.get(name, _HOST).device for name in tensors}
        self._surplus: dict[str, torch.Tensor] = {}
        self._kept = tensors if keep else None
        self.absent = set(tensors)  # weights that no tensor has filled yet
        self.lossless = True  # whether the store gives the weights back bit for bit
        self.store = ExpertStore.empty(site.spec, RecordLayout.of(site.spec, format), site.params.num_experts)
        for name, tensor in loaded.items():
            self.fill(name, tensor)

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one of the module's weights into the store."""
        pack(self.store.layout, self.store.records, self._params.views({name: tensor}))
        self._surplus |= {key: rows.clone() for key, rows in self._params.surplus({name: tensor}).items()}
        self.absent.discard(name)

    def placeholder(self, name: str) -> nn.Parameter | None:
        """What stands in for the module's weight of that name; None for other parameters of the module."""
        return self._placeholders.get(name)

    def _register(self) -> None:
        self.id = next(_ids)
        LAYERS[self.id] = self

    # ---- taking over and giving back

    def install(self) -> None:
        """Replace the module's methods and free its weights."""
        module, owner = self._module(), self._owner()
        module.__dict__[ATTRIBUTE] = self
        module.__dict__["forward"] = self.forward
        for name in _STATE_METHODS:
            owner.__dict__[name] = getattr(self, name)
        for name, parameter in self._parameters.items():
            owner._parameters[name] = self._placeholders[name]
            parameter.data = torch.empty(0, dtype=self._dtype, device=parameter.device)

    def remove(self) -> None:
        """Give the module its weights and its own methods back."""
        restored = self._kept if self._kept is not None else self.tensors(self._devices)
        module, owner = self._module(), self._owner()
        for name, parameter in self._parameters.items():
            parameter.data = restored[name]
            parameter.requires_grad_(owner.get_parameter(name).requires_grad)
            owner._parameters[name] = parameter
        for name in _STATE_METHODS:
            owner.__dict__.pop(name, None)  # installing may have been interrupted
        module.__dict__.pop(ATTRIBUTE, None)
        if self._former_forward is _MISSING:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = self._former_forward

    def tensors(self, devices: dict[str, torch.device] | None = None) -> dict[str, torch.Tensor]:
        """The module's weights as it had them, copied out of the store (to host memory by default)."""
        if self._kept is not None:
            return {name: tensor.clone() for name, tensor in self._kept.items()}
        result = {
            name: torch.empty(p.shape, dtype=self._dtype, device=devices[name] if devices else "cpu")
            for name, p in self._placeholders.items()
        }
        weights = unpack(self.store.layout, self.store.records)
        for part, view in self._params.views(result).items():
            view.copy_(getattr(weights, part))
        for name, rows in self._surplus.items():
            result[name][-len(rows) :] = rows
        return result

    def _module(self) -> nn.Module:
        return _alive(self._module_ref)

    def _owner(self) -> nn.Module:
        return _alive(self._owner_ref)

    # ---- running

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands for the module's forward, in its own calling convention."""
        module = self._module()
        if "parametrizations" in module._modules:
            raise RuntimeError(
                f"an adapter was put on the expert weights of {self.name!r} after patching, where it has no effect; "
                "unpatch the model, merge the adapter into the weights (merge_and_unload), then patch again"
            )
        args = (*args, *(kwargs[name] for name in self._arguments[len(args) :]))
        if self._convention is Convention.SCALED_ROWS:
            return self._run(args[0], *self._routes_of_rows(args[0]))
        hidden, ids, weights = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = self._run(flat, ids, weights)
        if self._identity_experts:
            scale = (weights * (ids >= self.store.num_experts)).sum(-1, keepdim=True)
            out = out + torch.where(scale != 0, flat * scale, 0).to(out.dtype)
        return out.view(hidden.shape)

    def _run(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._identity_experts:
            ids = ids.clamp(max=self.store.num_experts)
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)
        if differentiable or torch.compiler.is_compiling():
            return experts(hidden, ids, weights, self.id)
        return self.compute(hidden, ids, weights)

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted outputs, [T, H] in the dtype of `hidden`; no gradients."""
        return self.runtime.run(self, hidden, ids, weights)

    def _routes_of_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = rows.shape[0] // self.store.num_experts
        owners = torch.arange(self.store.num_experts, device=rows.device).repeat_interleave(tokens)
        ids = torch.where(rows.ne(0).any(-1), owners, -1)[:, None]
        return ids, torch.ones_like(ids, dtype=rows.dtype)

    # ---- the module's state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """What `to`, `half` and their like call: a new dtype converts the experts, which stay in host memory."""
        owner = self._owner()
        probe = fn(torch.empty(0, dtype=self._dtype, device=next(iter(self._devices.values()))))
        if probe.device.type == "meta":
            raise RuntimeError("a patched model cannot move to the meta device: unpatch it first")
        if probe.dtype != self._dtype:
            self._convert(probe.dtype)
        order, placeholders = list(owner._parameters), {name: owner._parameters.pop(name) for name in self._parameters}
        type(owner)._apply(owner, fn, recurse)
        others = dict(owner._parameters)
        owner._parameters.clear()
        owner._parameters.update({name: others.get(name, placeholders.get(name)) for name in order})
        return owner

    def _convert(self, dtype: torch.dtype) -> None:
        format = next((name for name, known in FLOATS.items() if known == dtype), None)
        if format is None or (not self.lossless and self._kept is None):
            raise RuntimeError(
                f"the patched experts of {self.name!r} are {self._dtype}, stored as {self.store.layout.format}, and "
                f"cannot become {dtype}: unpatch the model, convert it, and patch it again "
                f"(experts can be {', '.join(FLOATS)})"
            )
        weights = {name: tensor.to(dtype) for name, tensor in self.tensors().items()}
        if self._kept is not None:
            self._kept, format = weights, self.store.layout.format
        spec = self.store.spec
        store = ExpertStore.empty(spec, RecordLayout.of(spec, format), self.store.num_experts)
        self.store, self._dtype = store, dtype
        for name, tensor in weights.items():
            self.fill(name, tensor)
        self.runtime.replace_store(self.index, store)
        owner = self._owner()
        self._placeholders = {n: _placeholder(p.shape, dtype, p) for n, p in self._placeholders.items()}
        owner._parameters.update(self._placeholders)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        owner = self._owner()
        type(owner)._save_to_state_dict(owner, destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.tensors().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            raise RuntimeError(
                f"cannot load weights into the patched experts of {self.name!r}: unpatch the model first"
            )
        owner = self._owner()
        type(owner)._load_from_state_dict(owner, state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedLayer:
        """A layer of the copied module: it shares the records, which never change, and little else."""
        new = object.__new__(PatchedLayer)
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new._module_ref, new._owner_ref = ref(memo[id(self._module())]), ref(memo[id(self._owner())])
        new._parameters = copy.deepcopy(self._parameters, memo)
        new._placeholders = copy.deepcopy(self._placeholders, memo)
        new._kept = None if self._kept is None else {name: tensor.clone() for name, tensor in self._kept.items()}
        new.gate = self.gate.copied(memo)
        spec = replace(self.store.spec, post_norm=copy.deepcopy(self.store.spec.post_norm, memo))
        new.store = replace(self.store, spec=spec)
        new._register()
        new.runtime = copy.deepcopy(self.runtime, memo)
        new.runtime.adopt(new)
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: unpatch it first, or use save_pretrained, which works patched"
        )


def _alive(reference: ref[nn.Module]) -> nn.Module:
    module = reference()
    assert module is not None, "a patched layer is called by its module and does not outlive it"
    return module


def _placeholder(shape: torch.Size, dtype: torch.dtype, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), like.requires_grad)


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _refuse_adapter(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch wherever a module becomes the child of another: peft wraps a module to adapt its parameters."""
    layer = None if child is None else child.__dict__.get(ATTRIBUTE)
    if layer is not None and hasattr(parent, "parameter_name"):
        raise RuntimeError(
            f"an adapter was put on the patched expert weights of {layer.name!r}, where it would have no effect; "
            "unpatch the model, add the adapter, merge it (merge_and_unload), then patch again"
        )


register_module_module_registration_hook(_refuse_adapter)
