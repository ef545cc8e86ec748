"""Models that accelerate offloads (`device_map="auto"`): while patched, their weights stay where they are used.

Accelerate's hooks leave parameters on the meta device between calls and copy the values of a whole layer to the GPU in
every call. Without its experts, the rest of a model has room there for good. So `bring_in` takes all values from the
hooks, and what the experts' records did not take `settle` moves to the devices that the hooks name. `send_back` undoes
both. The hooks themselves stay, with their `offload` off.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from accelerate.utils.offload import PrefixedDataset
from torch import nn

# of a hook whose values are in its module: the tied weights that are on the device because of it, by address
_BROUGHT_IN = "_moebius_brought_in"


def bring_in(model: nn.Module) -> None:
    """Have the values of all weights that hooks offload to host memory in the model's parameters.

    Raises:
        ValueError: some are on disk; nothing has changed.
    """
    found = [entry for entry in _hooks(model) if entry[2].offload]
    for name, module, hook in found:
        entries, prefix = _entries(hook)
        if absent := [key for key in _tensors(module, hook) if prefix + key not in entries]:
            raise ValueError(
                f"accelerate has offloaded {f'{name}.{absent[0]}'!r} to disk (device_map): load the model with "
                "moebius.from_pretrained and the same arguments but device_map, which leaves experts in a file "
                "where host memory has no room for them"
            )
    for _, module, hook in found:
        entries, prefix = _entries(hook)
        hook.offload = False
        setattr(hook, _BROUGHT_IN, set())  # first: `send_back` then undoes also what an interrupt leaves half done
        for key in _tensors(module, hook):
            set_module_tensor_to_device(module, key, "cpu", value=entries[prefix + key])
            del entries[prefix + key]


def settle(model: nn.Module) -> None:
    """Move what was brought in, and is not on the meta device by now, to where it is used; the hooks keep a copy."""
    for module, hook in _brought_in(model):
        entries, prefix = _entries(hook)
        for key, tensor in _tensors(module, hook).items():
            if tensor.device.type != "meta":
                value = entries[prefix + key] = tensor.data
                if hook.execution_device not in _places(hook, value.data_ptr()):
                    getattr(hook, _BROUGHT_IN).add(value.data_ptr())
                set_module_tensor_to_device(
                    module, key, hook.execution_device, value=value, tied_params_map=hook.tied_params_map
                )


def send_back(model: nn.Module) -> None:
    """Give the hooks their values back, which do again what they did."""
    for module, hook in _brought_in(model):
        entries, prefix = _entries(hook)
        for key, tensor in _tensors(module, hook).items():
            entries.setdefault(prefix + key, tensor.data)
            set_module_tensor_to_device(module, key, "meta")
        for pointer in getattr(hook, _BROUGHT_IN):
            _places(hook, pointer).pop(hook.execution_device, None)
        hook.offload = True
        delattr(hook, _BROUGHT_IN)


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, AlignDevicesHook]]:
    for name, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(each, AlignDevicesHook):
                yield name, module, each


def _brought_in(model: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    return ((module, hook) for _, module, hook in _hooks(model) if hasattr(hook, _BROUGHT_IN))


def _tensors(module: nn.Module, hook: AlignDevicesHook) -> dict[str, torch.Tensor]:
    """What the hook offloads of the module, by the rule of its own `pre_forward`."""
    return dict(
        named_module_tensors(
            module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
    )


def _places(hook: AlignDevicesHook, pointer: int) -> dict[Any, torch.Tensor]:
    """Where the tied weight at this address is already, if it is one."""
    return (hook.tied_params_map or {}).get(pointer, {})


def _entries(hook: AlignDevicesHook) -> tuple[MutableMapping[str, torch.Tensor], str]:
    """The host tensors that hooks share, by name, and what this one puts before its names."""
    found: Any = hook.weights_map
    prefix = ""
    while isinstance(found, PrefixedDataset):
        found, prefix = found.dataset, found.prefix + prefix
    return getattr(found, "state_dict", found), prefix
