"""The files of a checkpoint, checked before anything is loaded: stock would fill what is missing, with a warning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moebius.hf_plugin.checkpoints.folders import with_variant

_INDICES = with_variant(SAFE_WEIGHTS_INDEX_NAME, "*").replace(".*", "*")  # of any variant, or none
_FLOATS = ("F64", "F32", "F16", "BF16")
_REMEDY = "download or copy the checkpoint again"


def check_index(folder: Path, variant: str | None) -> None:
    """Check that all files are there that an index in a folder names; nothing where transformers uses none.

    Raises:
        ValueError: the index is damaged, or a shard is missing.
    """
    path = folder / with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if path.is_file() and not (folder / with_variant(SAFE_WEIGHTS_NAME, variant)).is_file():
        for shard in sorted(set(_read_index(path).values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard} is missing, which {path.name} names: {_REMEDY}")


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        index = json.loads(path.read_text())
        shards = index.get("weight_map")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint ({error}): {_REMEDY}") from error
    if "metadata" not in index:
        raise ValueError(f"{path} has no metadata: {_REMEDY}")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{path} has no weight_map of tensors to files: {_REMEDY}")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{path} names {shard!r}, which is no file beside it: {_REMEDY}")
    return shards


def check_tensors(files: Sequence[str], model: nn.Module, quantized: bool) -> None:
    """Compare the headers of files with their index, and their types with the model's.

    Args:
        files: safetensors files of one folder.
        quantized: whether the tensors may be codes.

    Raises:
        ValueError: a file is damaged, lacks a tensor, or has integers or codes where the model has weights.
    """
    found = {Path(file).name: _types(file) for file in files}
    for index in {path for file in files for path in Path(file).parent.glob(_INDICES)}:
        for name, shard in _read_index(index).items():
            if shard in found and name not in found[shard]:
                raise ValueError(f"{index.with_name(shard)} has no {name}, which the index names: {_REMEDY}")
    if quantized:
        return
    codes = {name.rpartition(".")[2] for name, t in model.state_dict().items() if not torch.is_floating_point(t)}
    for file in files:
        for name, kind in found[Path(file).name].items():
            if kind not in _FLOATS and name.rpartition(".")[2] not in codes:
                raise ValueError(
                    f"{name} in {file} is {kind}, but the model's is floating-point and config.json has no "
                    f"quantization_config: the file is damaged or its config.json is another's; {_REMEDY}"
                )


def _types(file: str) -> dict[str, str]:
    if not file.endswith(".safetensors"):
        raise ValueError(
            f"{file} is no safetensors file, and others are not opened, since a pickle may run any code: load it with "
            "transformers where you trust it, and write it anew with save_pretrained"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): {_REMEDY}") from error
