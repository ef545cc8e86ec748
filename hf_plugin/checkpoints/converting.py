"""A checkpoint whose experts are records in one file: written by `convert`, loaded by mapping, turned back.

The folder holds what the original holds, but for the experts: they are in `expert_files.EXPERTS`, and stock weights
have one tensor of a wrong shape in their stead, so that whoever loads the folder without Moebius gets an error and not
a model with random experts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moebius.cpu_experts.record_file import RecordFile
from moebius.hf_plugin.checkpoints.folders import aside
from moebius.hf_plugin.checkpoints.loading import from_pretrained, load
from moebius.hf_plugin.checkpoints.quantizer import MoebiusConfig
from moebius.hf_plugin.running.defaults import default_threads
from moebius.hf_plugin.running.expert_files import CONVERSIONS, EXPERTS, GUARD, REST

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".partial")


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], expert_format: str = "native") -> Path:
    """Write a checkpoint whose experts are records in `expert_format`, which loads by mapping.

    It is loaded by `moebius.from_pretrained` and, with `quantization_config=moebius.MoebiusConfig(...)`, by any
    `from_pretrained` of transformers.

    Args:
        source: a folder or the name of a repository, as in transformers.
        target: a folder that does not exist yet, or is empty.
        expert_format: as in `moebius.Options`.

    Returns:
        The target.

    Raises:
        ValueError: the target is not empty, or the source cannot be loaded; nothing is left of the target.
        OSError: the disk is full, or the target cannot be written.
    """
    folder = _local(source)
    with _new_folder(Path(target)) as partial:
        config = MoebiusConfig(device="cpu", expert_format=expert_format)
        config.into = partial / EXPERTS
        _save_rest(load(str(folder), config), partial)
        _copy_others(folder, partial)
    return Path(target)


def to_stock(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a converted checkpoint as a stock one: the experts' numbers as they are, in the checkpoint's dtype.

    Args:
        source: a folder that `convert` has written.
        target: a folder that does not exist yet, or is empty.

    Returns:
        The target.

    Raises:
        ValueError: the source is not a converted checkpoint, or damaged; the target is not empty.
        OSError: the disk is full, or the target cannot be written.
    """
    folder = Path(source)
    if not (folder / EXPERTS).is_file():
        raise _not_converted(folder)
    with _new_folder(Path(target)) as partial:
        model = from_pretrained(str(folder), device="cpu", cpu_memory=1.0)
        model.save_pretrained(partial)
        _copy_others(folder, partial)
    return Path(target)


def check(folder: str | os.PathLike[str]) -> int:
    """Compare all checksums of a converted checkpoint; returns the bytes of its experts.

    Raises:
        ValueError: it is not a converted checkpoint, or damaged.
    """
    path = Path(folder) / EXPERTS
    if not path.is_file():
        raise _not_converted(folder)
    file = RecordFile(path)
    file.verify(default_threads())
    return sum(layer.nbytes for layer in file.layers.values())


def _not_converted(folder: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{folder} is not a converted checkpoint: it has no {EXPERTS}")


def _local(source: str | os.PathLike[str]) -> Path:
    if os.path.isdir(source):
        return Path(source)
    try:
        return Path(snapshot_download(os.fspath(source)))
    except (ValueError, OSError) as error:
        raise ValueError(f"{source} is neither a folder nor a repository that can be downloaded: {error}") from error


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its name when the block ends well, and else leaves nothing."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; give another, or remove it")
    target = target.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with aside(target.parent, target.name) as partial:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        partial.rename(target)


def _save_rest(model: PreTrainedModel, folder: Path) -> None:
    """All weights beside the experts, of which empty tensors are left."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    [guard, *_] = [name for name, tensor in model.state_dict().items() if not tensor.numel()]
    model.save_pretrained(folder, state_dict=state)
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.exists():
        facts = json.loads(index.read_text())
    else:
        with safe_open(single, "pt") as file:
            facts = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), REST)}
        single.rename(folder / REST)
    save_file({guard: torch.empty(0, dtype=model.dtype)}, folder / GUARD, metadata={"format": "pt"})
    facts["weight_map"][guard] = GUARD
    conversions: Any = model._weight_conversions
    facts["metadata"][CONVERSIONS] = [list(used.source_patterns) for used in conversions]
    index.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer and all other files that are not weights and not written yet."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
