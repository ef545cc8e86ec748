"""`save_pretrained` of a patched model: the checkpoint that stock would write, one layer's experts at a time.

Stock builds all weights, and reverts all of them to the checkpoint's layout, before it writes the first byte. Here the
whole is planned on the meta device; then each file is written tensor by tensor, in the order in which safetensors
would, and a layer's experts are unpacked and reverted when the first of their tensors is due.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import ref

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moebius.hf_plugin.checkpoints.folders import replacing_weights, with_variant
from moebius.hf_plugin.running.held import HeldWeights
from moebius.hf_plugin.running.layer import SHAPES_ONLY, held_by

State = dict[str, torch.Tensor]

_CODES = {  # in the order in which safetensors ranks them, the first at the end of a file
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}
_METHOD = "save_pretrained"


def install(model: nn.Module) -> None:
    """Let the models within a patched model save themselves in this way."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__[_METHOD] = Saver(module)


def remove(module: nn.Module) -> None:
    """Undo `install` for one module."""
    if isinstance(module.__dict__.get(_METHOD), Saver):
        del module.__dict__[_METHOD]


class Saver:
    """Stands in a patched model for its `save_pretrained`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: State | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`."""
        model = self._alive()
        unbound: Any = type(model).save_pretrained
        stock = partial(
            unbound, model, max_shard_size=max_shard_size, variant=variant, save_original_format=save_original_format,
            **kwargs,
        )  # fmt: skip
        if getattr(model, "_hf_peft_config_loaded", False):  # of which only adapters are saved
            return stock(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, push_to_hub=push_to_hub
            )
        if push_to_hub:
            raise ValueError(
                "a patched model cannot be pushed while it is saved: save it, then upload the folder with "
                "huggingface_hub.upload_folder"
            )
        if os.path.isfile(save_directory) or not os.fspath(save_directory):
            raise ValueError(f"{str(save_directory)!r} is no folder; give the folder to save the model in")
        if not is_main_process:
            return None
        plan = None if state_dict is not None else Plan(model, max_shard_size, variant, save_original_format)
        if plan is not None:
            plan.check_space(Path(save_directory))
        try:
            with replacing_weights(Path(save_directory), variant) as folder:
                stock(folder, state_dict=state_dict or {})
                if plan is not None:
                    plan.write(folder)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                error.errno,
                f"cannot save the model in {save_directory}: {error.strerror}; free space there, or choose a folder "
                "that can be written",
            ) from error
        return None

    def _alive(self) -> PreTrainedModel:
        model = self._model()
        if model is None:  # a strong reference would be a cycle, which keeps the memory of every dropped model
            raise RuntimeError("the model was dropped before it could be saved; keep it in a variable, then save it")
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return Saver(memo[id(self._alive())])


class Plan:
    """Which tensor of a model goes to which file, and how it is made.

    Raises:
        RuntimeError: the experts of a layer cannot be written apart from the others.
    """

    def __init__(
        self, model: PreTrainedModel, max_shard_size: int | str, variant: str | None, original_format: bool
    ) -> None:
        self._model, self._original = model, original_format
        state = _shapes(model)
        self._rest: State = self._reverted({name: t for name, t in state.items() if t.device.type != "meta"})
        self._layers: dict[str, _Layer] = {}  # of each tensor of the checkpoint that is made of experts
        self._made: tuple[_Layer | None, State] = None, {}  # the layer whose tensors are there, and these
        self._shapes: State = _on_meta(self._reverted(state))
        alone = _described(self._rest)
        for layer in _layers(model, state):
            layer.held.store.check_unchanged()  # before anything is written
            described = _described(self._reverted({name: state[name] for name in layer.names.values()}))
            alone |= described
            self._layers |= dict.fromkeys(described, layer)
        if alone != _described(self._shapes):
            raise RuntimeError(
                f"the experts of {type(model).__name__} cannot be written layer by layer, because the checkpoint's "
                "layout mixes them with other weights: unpatch the model and save it"
            )
        self._weights_name = with_variant(SAFE_WEIGHTS_NAME, variant)
        self._index_name = with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
        self._split = split_torch_state_dict_into_shards(
            self._shapes,
            filename_pattern=self._weights_name.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )

    def check_space(self, folder: Path) -> None:
        """Raise OSError where the folder's disk has no room, before anything is written."""
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        needed, free = sum(tensor.nbytes for tensor in self._shapes.values()), shutil.disk_usage(existing).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint takes {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free for {folder}: "
                "free space, or choose a folder on another disk",
            )

    def write(self, folder: Path) -> None:
        """Write the weights' files, and the index of several; they are on the disk then."""
        for file, names in self._split.filename_to_tensors.items():
            tensors = {name: self._shapes[name] for name in names}
            with (folder / file).open("wb") as target:
                write_safetensors(target, tensors, self._tensor)
                target.flush()
                os.fsync(target.fileno())  # others may be deleted for it
        if self._split.is_sharded:
            facts = {"total_parameters": self._model.num_parameters(), **self._split.metadata}
            index = {"metadata": facts, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / self._index_name).write_text(text, encoding="utf-8")

    def _tensor(self, name: str) -> torch.Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return self._rest[name]
        if self._made[0] is not layer:
            self._made = None, {}  # before the next layer is unpacked
            tensors = layer.held.tensors()
            self._made = layer, self._reverted({full: tensors[name] for name, full in layer.names.items()})
        return self._made[1][name]

    def _reverted(self, state: State) -> State:
        return revert_weight_conversion(self._model, state) if self._original else state


class _Layer(NamedTuple):
    """One layer's experts: where they are, and the full name of each weight."""

    held: HeldWeights
    names: dict[str, str]


def _shapes(model: PreTrainedModel) -> State:
    """The state dict that is to be written, with experts on the meta device."""
    token = SHAPES_ONLY.set(True)
    try:
        state = dict(model.state_dict())
    finally:
        SHAPES_ONLY.reset(token)
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return remove_tied_weights_from_state_dict(state, model)


def _layers(model: PreTrainedModel, state: State) -> Iterator[_Layer]:
    for path, module in model.named_modules():
        held = held_by(module)
        if held is not None:
            names = {name: f"{path}.{name}" for name in held.placeholders if f"{path}.{name}" in state}
            if names:
                yield _Layer(held, names)


def _on_meta(state: State) -> State:
    """Tensors that share no storage, by whose size that of files would be reckoned."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def _described(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def write_safetensors(file: BinaryIO, shapes: State, tensor: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file as its library would, byte for byte, without all tensors in memory.

    Args:
        shapes: tensors on any device, whose names, shapes and dtypes count.
        tensor: gives the data of each.
    """
    order = sorted(shapes, key=lambda name: (-_RANKS[shapes[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, start = shapes[name], end
        end += shape.nbytes
        header[name] = {"dtype": _CODES[shape.dtype], "shape": list(shape.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = tensor(name).detach().to("cpu").contiguous()
        assert (data.shape, data.dtype) == (shapes[name].shape, shapes[name].dtype), name
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)
