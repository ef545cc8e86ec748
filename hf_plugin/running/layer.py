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
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moebius.hf_plugin.discovery.adapters import Convention
from moebius.hf_plugin.discovery.gates import LayerGate
from moebius.hf_plugin.discovery.sites import ExpertsSite
from moebius.hf_plugin.running.held import HeldWeights
from moebius.hf_plugin.running.op import LAYERS, experts

if TYPE_CHECKING:
    from moebius.hf_plugin.running.runtime import ModelRuntime

ATTRIBUTE = "_moebius"  # of a patched experts module: its PatchedLayer
_STATE_METHODS = ("_apply", "_save_to_state_dict", "_load_from_state_dict")
# whether state dicts show experts as what stands for them on the meta device
SHAPES_ONLY: ContextVar[bool] = ContextVar("SHAPES_ONLY", default=False)
_ids = itertools.count()


class PatchedLayer:
    """Runs one experts module's calls through Moebius and holds its weights meanwhile.

    Args:
        index: number of the layer among the model's patched layers.
        site: the module as found.
        parent: the module that holds it, where its router is.
        held: its weights; layers with the same parameters (tied weights) share one.
    """

    def __init__(self, index: int, site: ExpertsSite, parent: nn.Module, held: HeldWeights) -> None:
        self.index, self.name = index, site.name
        self.runtime: ModelRuntime  # set when the model's layers are complete
        self.gate = LayerGate(parent, site.params.num_experts)
        self._convention, self._identity_experts = site.convention, site.identity_experts
        self._arguments = _argument_names(site.module)
        self._module_ref, self._owner_ref, self._parent_ref = ref(site.module), ref(site.owner), ref(parent)
        self._former_forward = site.module.__dict__.get("forward")  # what a hook of accelerate put there
        self.held: HeldWeights = held
        self._spec = site.spec
        self.store = replace(self.held.store, spec=self._spec)
        self._register()

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
        owner._parameters.update(self.held.placeholders)
        self.held.release()

    def remove(self) -> None:
        """Give the module its weights and its own methods back."""
        module, owner = self._module(), self._owner()
        try:
            self.held.restore()
        finally:
            owner._parameters.update(self.held.parameters)
            for name in _STATE_METHODS:
                owner.__dict__.pop(name, None)  # installing may have been interrupted
            module.__dict__.pop(ATTRIBUTE, None)
            if self._former_forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = self._former_forward

    def _module(self) -> nn.Module:
        return _alive(self._module_ref)

    def _owner(self) -> nn.Module:
        return _alive(self._owner_ref)

    def _parent(self) -> nn.Module:
        return _alive(self._parent_ref)

    # ---- running

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands for the module's forward, in its own calling convention."""
        module = self._module()
        if "parametrizations" in module._modules:
            raise RuntimeError(
                f"an adapter was put on the expert weights of {self.name!r} after patching, where it has no effect; "
                "unpatch the model, merge the adapter into the weights (merge_and_unload), then patch again"
            )
        if kwargs:
            args = (*args, *(kwargs[name] for name in self._arguments[len(args) :]))
        if self._convention is Convention.SCALED_ROWS:
            return self._run(args[0], *self._routes_of_rows(args[0]))
        hidden, ids, weights = args
        if hidden.ndim == 2 and not self._identity_experts:
            return self._run(hidden, ids, weights)
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
        if differentiable or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return experts(hidden, ids, weights, self.id)
        return self.compute(hidden, ids, weights)

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted outputs, [T, H] in the dtype of `hidden`; no gradients."""
        parameters = self._owner()._parameters
        for name in self.held.placeholders:
            if (found := parameters.get(name)) is None or not found.is_meta:
                raise RuntimeError(
                    f"the patched experts of {self.name!r} were given another {name}, by an assignment, a functional "
                    "call or a hook of accelerate, where it has no effect: unpatch the model first, then patch it again"
                )
        return self.runtime.run(self, hidden, ids, weights)

    @property
    def device(self) -> torch.device:
        """Where the module is called: where the weights beside the experts are, else where the experts' were."""
        others = (p.device for p in self._parent().parameters() if p.device.type != "meta")
        return next(others, self.held.device)

    def tokens(self, rows: int) -> int:
        """Tokens that a call with so many rows of hidden states stands for."""
        return rows // self.store.num_experts if self._convention is Convention.SCALED_ROWS else rows

    def _routes_of_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = rows.shape[0] // self.store.num_experts
        owners = torch.arange(self.store.num_experts, device=rows.device).repeat_interleave(tokens)
        ids = torch.where(rows.ne(0).any(-1), owners, -1)[:, None]
        return ids, torch.ones_like(ids, dtype=rows.dtype)

    # ---- the module's state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """What `to`, `half` and their like call: a new dtype converts the experts, which stay in host memory."""
        owner, held = self._owner(), self.held
        probe = fn(torch.empty(0, dtype=held.dtype, device=held.device))
        if probe.device.type == "meta":
            raise RuntimeError("a patched model cannot move to the meta device: unpatch it first")
        if probe.dtype != held.dtype:
            held.convert(probe.dtype, self.name)
        if self.store.content is not held.store.content:  # by this call, or by that of a module with the same experts
            self.store = replace(held.store, spec=self._spec)
            self.runtime.replace_store(self.index, self.store)
        order = list(owner._parameters)
        for name in held.placeholders:
            del owner._parameters[name]
        type(owner)._apply(owner, fn, recurse)
        others = dict(owner._parameters)
        owner._parameters.clear()
        owner._parameters.update({name: others.get(name, held.placeholders.get(name)) for name in order})
        return owner

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        owner = self._owner()
        type(owner)._save_to_state_dict(owner, destination, prefix, keep_vars)
        tensors = self.held.placeholders if SHAPES_ONLY.get() else self.held.tensors()
        destination.update({prefix + name: tensor.data for name, tensor in tensors.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self.held.parameters):
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
        new._parent_ref = ref(memo.get(id(self._parent()), new._module()))
        new._former_forward = copy.deepcopy(self._former_forward, memo)
        new.held = copy.deepcopy(self.held, memo)
        new.gate = self.gate.copied(memo)
        new._spec = replace(self._spec, post_norm=copy.deepcopy(self._spec.post_norm, memo))
        new.store = replace(self.store, spec=new._spec)
        new._register()
        new.runtime = copy.deepcopy(self.runtime, memo)
        new.runtime.adopt(new)
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: unpatch it first, or use save_pretrained, which works patched"
        )


def held_by(owner: nn.Module) -> HeldWeights | None:
    """The weights that a module would have as parameters if it were not patched."""
    method = owner.__dict__.get(_STATE_METHODS[0])
    layer = getattr(method, "__self__", None)
    return layer.held if isinstance(layer, PatchedLayer) else None


def _alive(reference: ref[nn.Module]) -> nn.Module:
    module = reference()
    assert module is not None, "a patched layer is called by its module and does not outlive it"
    return module


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
