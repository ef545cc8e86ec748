"""A layer's router as a function that can be asked about any hidden states, without being noticed.

The router's class-level `forward` is called, never the module: no hook fires, so recorded router logits and auxiliary
losses stay as they are. Whether the function found really is the layer's routing is settled by data: on the layer's
first call it must give the ids that the model gave. Routers that need more than the hidden states (hashed token ids,
state across layers, another input than the experts') fail that check and are left alone, with the reason in `stats`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import nn

from moebius.predictors.routing import MAX_TOKENS, Gate, Routing

_AGREEMENT = 0.99  # share of ids that must agree; below 1 only because ties may break either way


class LayerGate:
    """The routing function of one layer, found among its candidates at the layer's first call.

    `reason` says why there is none, or is None.
    """

    def __init__(self, parent: nn.Module | None, num_experts: int) -> None:
        self._parent = (lambda: None) if parent is None else ref(parent)  # no cycle through the module's layer
        self._num_experts = num_experts
        self._gate: Gate | None = None
        self._settled = False
        self.reason: str | None = None

    def __call__(self) -> Gate | None:
        """The gate once it is known and usable: routers draw random numbers in training."""
        parent = self._parent()
        return None if parent is None or parent.training else self._gate

    def copied(self, memo: dict[int, Any]) -> LayerGate:
        """The gate of the copied module, by the memo of `copy.deepcopy`; it settles anew."""
        return LayerGate(memo.get(id(self._parent())), self._num_experts)

    def settle(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Choose the candidate that reproduces ids [T, k] from hidden states x [T, H]; once."""
        if self._settled or not len(x):
            return
        parent = self._parent()
        if parent is None or parent.training:
            return
        self._settled = True
        x, ids = x[:MAX_TOKENS], ids[:MAX_TOKENS]
        failures = []
        for candidate in self._candidates(parent, ids.shape[-1]):
            try:
                found = candidate(x).ids
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if found.shape == ids.shape and _agreement(found, ids) >= _AGREEMENT:
                self._gate = candidate
                return
            failures.append("gives other experts than the model for the experts' own input")
        self.reason = f"no gate prediction: the router {failures[-1]}" if failures else "no gate prediction: no router"

    def _candidates(self, parent: nn.Module, k: int) -> Iterator[Gate]:
        route, owner = getattr(type(parent), "route_tokens_to_experts", None), ref(parent)
        for router in parent.children():
            wide = (p for p in router.parameters() if p.ndim == 2 and p.shape[0] >= self._num_experts)
            weight, extra = next(wide, None), _extra_arguments(router, parent)
            if weight is None or extra is None:
                continue
            forward = partial(type(router).forward, router, **extra)
            for form in (_flat, _batched) if route is None else (_flat, _batched, partial(_routed, route, owner)):
                yield partial(_ask, form, forward, weight, k, self._num_experts)


@torch.no_grad()
def _ask(form: Any, forward: Any, weight: nn.Parameter, k: int, num_experts: int, x: torch.Tensor) -> Routing:
    output = form(forward, x.to(weight.device))  # the layer before may be on another device
    tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
    return Routing(_ids(tensors, k, num_experts), _scores(tensors, k, num_experts))


def _flat(forward: Any, x: torch.Tensor) -> Any:
    return forward(x)


def _batched(forward: Any, x: torch.Tensor) -> Any:
    return forward(x[None])


def _routed(route: Any, owner: ref[nn.Module], forward: Any, x: torch.Tensor) -> Any:
    scores = forward(x)
    found, given = route(owner(), scores), scores if isinstance(scores, tuple) else (scores,)
    return (*(found if isinstance(found, tuple) else (found,)), *given)


def _extra_arguments(router: nn.Module, parent: nn.Module) -> dict[str, Any] | None:
    """What the router takes beside the hidden states, from the parent's attributes of those names (its selection bias).

    None where something it requires is not there.
    """
    arguments = {}
    for parameter in list(inspect.signature(type(router).forward).parameters.values())[2:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(parent, parameter.name):
            arguments[parameter.name] = getattr(parent, parameter.name)
        elif parameter.default is parameter.empty:
            return None
    return arguments


def _ids(tensors: list[torch.Tensor], k: int, num_experts: int) -> torch.Tensor:
    """Expert ids [T, k] out of what a router returns: ids as they are, else the largest of its scores.

    Ids beyond the routed experts become E: no expert.
    """
    for tensor in tensors:
        if not tensor.is_floating_point() and tensor.shape[-1] == k:
            return tensor.reshape(-1, k).clamp(max=num_experts)
    return tensors[0].flatten(0, -2).topk(k, dim=-1).indices.clamp(max=num_experts)


def _scores(tensors: list[torch.Tensor], k: int, num_experts: int) -> torch.Tensor | None:
    """A score of each routed expert, float [T, E], if the router returns one: the first tensor that is wide enough."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape[-1] >= max(num_experts, k + 1):
            return tensor.flatten(0, -2).narrow(1, 0, num_experts)
    return None


def _agreement(found: torch.Tensor, ids: torch.Tensor) -> float:
    same = np.sort(found.cpu().numpy(), -1) == np.sort(ids.cpu().numpy(), -1)
    return float(same.mean())


def parent_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the one called `name`, where its router is."""
    return model.get_submodule(name.rpartition(".")[0])
