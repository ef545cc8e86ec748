"""The weights of an experts module while it is patched: in records, with all that is needed to give them back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moebius.cpu_experts.mapped_file import MappedFile
from moebius.cpu_experts.record_file import LayerFacts
from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.discovery.sites import ExpertsSite
from moebius.kernels.experts import RecordLayout
from moebius.kernels.formats import FLOATS
from moebius.kernels.packing import CodedMatrix, pack
from moebius.kernels.packing import copy as copy_weight

_HOST = torch.device("cpu")
# What a parameter holds must never come from inference mode, out of which torch refuses to use it
_WITH_GRADIENTS = torch.inference_mode(mode=False)


class HeldWeights:
    """Takes the weights of one experts module; modules with tied experts share one of these.

    Args:
        site: the module as found; weights on the meta device come later, through `fill`, or in a store that is given.
        format: storage format of the experts.
        keep: keep the original tensors, so that they come back however lossy `format` is.
    """

    @_WITH_GRADIENTS
    def __init__(self, site: ExpertsSite, format: str, keep: bool) -> None:
        tensors = site.tensors()
        loaded = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}
        self.dtype = site.dtype
        self.parameters: dict[str, nn.Parameter] = {  # the module's own, empty as long as it is patched
            name: site.owner.get_parameter(name)
            if name in loaded
            else nn.Parameter(torch.empty(0, dtype=site.dtype, device=_HOST))
            for name in tensors
        }
        self.placeholders: dict[str, nn.Parameter] = {  # what stands in the module in their stead
            name: _placeholder(tensor.shape, tensor.dtype, self.parameters[name]) for name, tensor in tensors.items()
        }
        self.absent = set(tensors)  # weights that no tensor has filled yet
        self._params, self._kept = site.params, tensors if keep else None
        self._devices = {name: loaded[name].device if name in loaded else _HOST for name in tensors}
        self.surplus: dict[str, torch.Tensor] = {}  # rows that no expert has, which a checkpoint holds nevertheless
        self.spec, self.layout, self.num_experts = (
            site.spec,
            RecordLayout.of(site.spec, format),
            site.params.num_experts,
        )
        # Whether the weights can be given back, bit for bit; of a loaded module `patch` takes no format that loses any
        self.lossless = keep or bool(loaded) or format == site.coded or FLOATS.get(format) == site.dtype
        self._store: ExpertStore | None = None
        self._adopted = False  # whether the records are in a file
        self.note = ""  # what a reader of the statistics should know of where they are
        for name, tensor in loaded.items():
            self.fill(name, tensor)

    @property
    def device(self) -> torch.device:
        """Where the weights were."""
        return next(iter(self._devices.values()))

    @property
    def store(self) -> ExpertStore:
        """The records; memory is allocated for them when they are first asked for."""
        if self._store is None:
            self._store = ExpertStore.empty(self.spec, self.layout, self.num_experts)
        return self._store

    def adopt(self, records: torch.Tensor, surplus: dict[str, torch.Tensor], file: MappedFile) -> None:
        """Have all weights in records (uint8 [E, nbytes]) of a file."""
        self._store = ExpertStore(self.spec, self.layout, self.num_experts, records, (file,))
        self._adopted, self.surplus = True, surplus
        self.absent.clear()

    def use(self, parts: Mapping[str, Sequence[torch.Tensor]], files: Iterable[MappedFile]) -> None:
        """Have all weights where they are: in each expert's tensors, by the names of `layout.parts()`, in files."""
        self._store = ExpertStore(self.spec, self.layout, self.num_experts, parts, tuple(files))

    def drop(self) -> None:
        """Free the memory of the records, which are elsewhere."""
        self._store = None

    def facts(self) -> LayerFacts:
        """What a file of these records says of them."""
        empty = {name: placeholder.data for name, placeholder in self.placeholders.items()}
        extras = {name: (rows.dtype, tuple(rows.shape)) for name, rows in self._params.surplus(empty).items()}
        return LayerFacts(self.layout, self.num_experts, extras)

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one of the module's weights into the store."""
        pack(self.store.layout, self.store.records, self._params.views({name: tensor}))
        self.surplus |= {key: rows.clone() for key, rows in self._params.surplus({name: tensor}).items()}
        self.absent.discard(name)

    def stacked(self, name: str) -> tuple[str, ...]:
        """The matrices that follow each other in each expert's rows of a weight; see `ExpertParams.stacked`."""
        return self._params.stacked(name)

    def fill_part(self, record: torch.Tensor, part: str, read: Callable[[torch.Tensor], None]) -> None:
        """Fill a matrix of an expert's record through what fills a tensor of the module's dtype; from any thread."""
        stored = self.layout.stored(record)[part]
        if stored.dtype == self.dtype:
            read(stored)
        else:
            weight = torch.empty(self.layout.shapes()[part], dtype=self.dtype, device=_HOST)
            read(weight)
            pack(self.layout, record, {part: weight})

    def fill_coded(self, record: torch.Tensor, matrices: Mapping[str, CodedMatrix]) -> None:
        """Fill some matrices of an expert's record from coded ones; from any thread."""
        pack(self.layout, record, matrices)

    def release(self) -> None:
        """Free the module's own tensors."""
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0, dtype=self.dtype, device=parameter.device)

    @_WITH_GRADIENTS
    def restore(self) -> None:
        """Give the module's own parameters their values back, where they were.

        Raises:
            RuntimeError: their device fails, or has no room; they have their values back in host memory.
        """
        try:
            self._give_back(self._kept if self._kept is not None else self._unpack(self._devices))
        except RuntimeError:
            self._give_back(self.tensors())
            raise

    def _give_back(self, restored: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = restored[name]
            parameter.requires_grad_(self.placeholders[name].requires_grad)

    def tensors(self, only: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        """Copies of the weights as the module had them, in host memory; `only` of some experts, else zeros."""
        if self._kept is not None:
            return {name: tensor.to("cpu", copy=True) for name, tensor in self._kept.items()}
        return self._unpack(dict.fromkeys(self._devices, _HOST), only)

    def _unpack(self, devices: dict[str, torch.device], only: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        self.store.check_unchanged()
        result = {
            name: torch.empty(placeholder.shape, dtype=self.dtype, device=devices[name])
            if only is None
            else _untouched_zeros(placeholder.shape, self.dtype)
            for name, placeholder in self.placeholders.items()
        }
        views = self._params.views(result)
        for expert in range(self.num_experts) if only is None else only:  # one by one: quantised ones unpack to fp32
            weights = self.store.weights(expert)
            for part, view in views.items():
                copy_weight(view[expert], getattr(weights, part))
        for name, rows in self.surplus.items():
            result[name][-len(rows) :] = rows
        return result

    @_WITH_GRADIENTS
    def convert(self, dtype: torch.dtype, name: str) -> None:
        """Follow the module `name` to another dtype, into a new store.

        Raises:
            RuntimeError: experts cannot have that dtype, or the store does not hold what would have to be converted.
        """
        if self._adopted:
            raise RuntimeError(
                f"the experts of {name!r} are in a file, as {self.layout.format}, and cannot become {dtype}: load the "
                f"model with dtype={str(dtype).removeprefix('torch.')!r}"
            )
        format = next((name for name, known in FLOATS.items() if known == dtype), None)
        if format is None or not self.lossless:
            raise RuntimeError(
                f"the patched experts of {name!r} are {self.dtype}, stored as {self.layout.format}, and cannot "
                f"become {dtype}: unpatch the model, convert it, and patch it again "
                f"(experts can be {', '.join(FLOATS)})"
            )
        weights = {name: tensor.to(dtype) for name, tensor in self.tensors().items()}
        if self._kept is not None:
            self._kept, format = weights, self.layout.format
        self.layout, self.dtype = RecordLayout.of(self.spec, format), dtype
        self._store, self.note = None, ""
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


def _untouched_zeros(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory that take none where nothing is written; torch writes its own, for 0.3 s per GB."""
    return torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _placeholder(shape: torch.Size, dtype: torch.dtype, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), like.requires_grad)
