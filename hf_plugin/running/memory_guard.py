"""Where the device runs out of memory within a model's forward, the expert cache shrinks and the forward runs again.

Whoever asked for the memory: attention, a growing KV cache, logits, or our own launches. Running a forward a second
time is right only if it finds the KV cache as the first time, so that `KvState` takes back what the first has appended.
Where it cannot tell how (a static cache, the state of linear attention, a cache of the caller's own class), the error
goes to the caller, and the next call finds the memory.

What counts is an error for which `out_of_memory` is true, from any forward of the model: that of torch's allocator, and
those of Triton and of libraries, which ask the driver for memory past it. Not seen are allocations between two forwards
and those of other models.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from moebius.gpu_cache.device import out_of_memory

if TYPE_CHECKING:
    from moebius.hf_plugin.running.runtime import ModelRuntime

_MISSING = object()
_GROWING = (DynamicLayer, DynamicIndexedLayer)  # the latter's indexer replaces its keys, as a window does
_VALUES = (torch.Tensor, str, int, float, type(None), torch.dtype)  # that a forward reads and does not change


class GuardedForward:
    """Stands in a patched model for its `forward`.

    Args:
        model: the model, which has this object in its `__dict__` while it is patched.
        runtime: whose caches shrink.
    """

    def __init__(self, model: nn.Module, runtime: ModelRuntime) -> None:
        self._model, self._runtime = ref(model), runtime
        self._former = model.__dict__.get("forward", _MISSING)
        self.__signature__ = inspect.signature(model.forward)

    def install(self) -> None:
        """Take the place of the model's forward."""
        self._alive().__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        state = KvState(_flat((args, kwargs)))
        while True:
            try:
                return self._forward(*args, **kwargs)
            except RuntimeError as error:
                if not out_of_memory(error) or not self._runtime.shrink():
                    raise
                if not state.known:
                    error.add_note(
                        "moebius: the expert cache has given memory back, but this forward cannot be repeated, since "
                        "what it changed in its KV cache is not known; call again from the start"
                    )
                    raise
            state.restore()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._alive()
        if self._former is _MISSING:
            return type(model).forward(model, *args, **kwargs)
        return self._former(*args, **kwargs)  # type: ignore[operator]

    def _alive(self) -> nn.Module:
        model = self._model()
        assert model is not None, "a model's forward does not outlive it"
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedForward:
        """The guard of a copied model; the runtime is that of the copied layers."""
        import copy

        new = object.__new__(GuardedForward)
        memo[id(self)] = new
        new._model, new._runtime = ref(memo[id(self._alive())]), copy.deepcopy(self._runtime, memo)
        new._former = self._former if self._former is _MISSING else copy.deepcopy(self._former, memo)
        new.__signature__ = self.__signature__
        return new


def remove(model: nn.Module) -> None:
    """Give the model its own forward back."""
    guard = model.__dict__.get("forward")
    if not isinstance(guard, GuardedForward):
        return
    if guard._former is _MISSING:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = guard._former


class KvState:
    """What a forward may change in the caches among its arguments, to be taken back.

    Layers that grow are cut to their former length, which keeps no second copy of them; those that slide keep their
    former window, and those with an indexer its former keys, until the forward has ended.

    Args:
        values: all arguments, one by one.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.known = True  # whether `restore` brings everything back
        self._caches: list[tuple[DynamicCache, list[dict[str, Any]]]] = []
        for value in values:
            if type(value) is DynamicCache and all(_restorable(layer) for layer in value.layers):
                self._caches.append((value, [_facts(layer) for layer in value.layers]))
            elif not isinstance(value, _VALUES):
                self.known = False

    def restore(self) -> None:
        """Make the caches what they were."""
        for cache, facts in self._caches:
            del cache.layers[len(facts) :]
            for layer, former in zip(cache.layers, facts, strict=True):
                now = dict(vars(layer))
                vars(layer).clear()
                vars(layer).update(former)
                if (length := vars(layer).pop("length", None)) is not None:
                    vars(layer).update({name: now[name][..., :length, :] for name in ("keys", "values")})


def _restorable(layer: Any) -> bool:
    return type(layer) in (*_GROWING, DynamicSlidingWindowLayer)


def _facts(layer: Any) -> dict[str, Any]:
    """The layer's attributes; where an update appends to its tensors and forgets nothing, their `length` instead."""
    facts = dict(vars(layer))
    keys = facts.get("keys")
    if type(layer) in _GROWING and keys is not None and keys.ndim > 1:
        del facts["keys"], facts["values"]
        facts["length"] = keys.shape[-2]
    return facts


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        yield from _flat(value)
