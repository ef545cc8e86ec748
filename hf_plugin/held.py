"""The weights of an experts module while it is patched: in records, with all that is needed to give them back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.discovery import ExpertsSite
from moebius.kernels.experts import RecordLayout
from moebius.kernels.formats import FLOATS
from moebius.kernels.packing import pack, unpack

_HOST = torch.empty(0)


class HeldWeights:
    """Takes the weights of one experts module; modules with tied experts share one of these.

    Args:
        site: the module as found; weights on the meta device are filled in later, one by one.
        format: storage format of the experts.
        keep: keep the original tensors, so that they come back however lossy `format` is.
    """

    def __init__(self, site: ExpertsSite, format: str, keep: bool) -> None:
        tensors = site.tensors()
        loaded = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}
        self.dtype = site.dtype
        self.parameters: dict[str, nn.Parameter] = {  # the module's own, empty as long as it is patched
            name: site.owner.get_parameter(name) if name in loaded else nn.Parameter(torch.empty(0, dtype=site.dtype))
            for name in tensors
        }
        self.placeholders: dict[str, nn.Parameter] = {  # what stands in the module in their stead
            name: _placeholder(tensor.shape, tensor.dtype, self.parameters[name]) for name, tensor in tensors.items()
        }
        self.absent = set(tensors)  # weights that no tensor has filled yet
        self.lossless = True  # whether the store gives the weights back bit for bit
        self._params, self._kept = site.params, tensors if keep else None
        self._devices = {name: loaded.get(name, _HOST).device for name in tensors}
        self._surplus: dict[str, torch.Tensor] = {}
        self.store = ExpertStore.empty(site.spec, RecordLayout.of(site.spec, format), site.params.num_experts)
        for name, tensor in loaded.items():
            self.fill(name, tensor)

    @property
    def device(self) -> torch.device:
        """Where the weights were."""
        return next(iter(self._devices.values()))

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one of the module's weights into the store."""
        pack(self.store.layout, self.store.records, self._params.views({name: tensor}))
        self._surplus |= {key: rows.clone() for key, rows in self._params.surplus({name: tensor}).items()}
        self.absent.discard(name)

    def release(self) -> None:
        """Free the module's own tensors."""
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0, dtype=self.dtype, device=parameter.device)

    def restore(self) -> None:
        """Give the module's own parameters their values back, where they were."""
        restored = self._kept if self._kept is not None else self._unpack(self._devices)
        for name, parameter in self.parameters.items():
            parameter.data = restored[name]
            parameter.requires_grad_(self.placeholders[name].requires_grad)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the weights as the module had them, in host memory."""
        if self._kept is not None:
            return {name: tensor.to("cpu", copy=True) for name, tensor in self._kept.items()}
        return self._unpack(dict.fromkeys(self._devices, torch.device("cpu")))

    def _unpack(self, devices: dict[str, torch.device]) -> dict[str, torch.Tensor]:
        result = {
            name: torch.empty(placeholder.shape, dtype=self.dtype, device=devices[name])
            for name, placeholder in self.placeholders.items()
        }
        weights = unpack(self.store.layout, self.store.records)
        for part, view in self._params.views(result).items():
            view.copy_(getattr(weights, part))
        for name, rows in self._surplus.items():
            result[name][-len(rows) :] = rows
        return result

    def convert(self, dtype: torch.dtype, name: str) -> None:
        """Follow the module `name` to another dtype, into a new store.

        Raises:
            RuntimeError: experts cannot have that dtype, or the store does not hold what would have to be converted.
        """
        format = next((name for name, known in FLOATS.items() if known == dtype), None)
        if format is None or (not self.lossless and self._kept is None):
            raise RuntimeError(
                f"the patched experts of {name!r} are {self.dtype}, stored as {self.store.layout.format}, and cannot "
                f"become {dtype}: unpatch the model, convert it, and patch it again "
                f"(experts can be {', '.join(FLOATS)})"
            )
        weights = {name: tensor.to(dtype) for name, tensor in self.tensors().items()}
        if self._kept is not None:
            self._kept, format = weights, self.store.layout.format
        spec = self.store.spec
        self.store = ExpertStore.empty(spec, RecordLayout.of(spec, format), self.store.num_experts)
        self.dtype = dtype
        for name, tensor in weights.items():
            self.fill(name, tensor)
        self.placeholders = {n: _placeholder(p.shape, dtype, p) for n, p in self.placeholders.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldWeights:
        """Shares the records, which never change, and the way they are laid out."""
        new = object.__new__(HeldWeights)
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new.parameters = copy.deepcopy(self.parameters, memo)
        new.placeholders = copy.deepcopy(self.placeholders, memo)
        new._kept = None if self._kept is None else {name: tensor.clone() for name, tensor in self._kept.items()}
        return new


def _placeholder(shape: torch.Size, dtype: torch.dtype, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), like.requires_grad)
