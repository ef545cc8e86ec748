"""Load a checkpoint straight into the patched state, in one line."""

from __future__ import annotations

import copy
import gc
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moebius.hf_plugin.checkpoints.codes import methods
from moebius.hf_plugin.checkpoints.files import check_index
from moebius.hf_plugin.checkpoints.quantizer import MoebiusConfig
from moebius.hf_plugin.options import Options, unknown_option

# Arguments that say where both configuration and weights are
_HUB = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code", "subfolder", "force_download",
        "proxies", "code_revision")  # fmt: skip


def from_pretrained(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model straight into the patched state, with the peak of its stores and one packed tensor.

    On the CPU, experts in bf16, fp16, fp32, or coded in 8 bits (FP8, int8), are used in the checkpoint's mapped files
    where the file system has large pages, and else copied; `stats(model).notes` says which, and why. Do not write to
    files in use: replacing them, as `save_pretrained` and downloads do, is safe; after a change in place the model
    raises, and only a file that is cut short while a forward runs may end the process (SIGBUS).

    Args:
        name_or_path: as in transformers: a folder or the name of a repository.
        kwargs: fields of `moebius.Options`; all else goes to transformers' `from_pretrained`. Only safetensors are
            read.

    Returns:
        A model of the class that its configuration names, as after `moebius.patch`.

    Raises:
        ValueError: the model has no experts that can be taken over, is quantised in a way that is not supported, lacks
            weights, or an option has a bad value.
        TypeError: an argument is neither an option nor one of transformers'.
    """
    if "quantization_config" in kwargs:
        raise ValueError(
            "moebius.from_pretrained takes no quantization_config: what a checkpoint is quantised with is in its "
            "config.json, and expert_format= has experts converted; leave it out"
        )
    options = {name: kwargs.pop(name) for name in Options.__slots__ if name in kwargs}
    return load(name_or_path, MoebiusConfig(**options), **kwargs)


def load(name_or_path: str, quantization_config: MoebiusConfig, **kwargs: Any) -> PreTrainedModel:
    """As `from_pretrained`, with the options in a `MoebiusConfig`."""
    if os.path.isfile(name_or_path) or (os.path.isabs(name_or_path) and not os.path.isdir(name_or_path)):
        raise ValueError(
            f"{name_or_path} is no folder: give one that has a config.json and weights, or the name of a repository"
        )
    folder = Path(name_or_path) / kwargs.get("subfolder", "")
    check_index(folder, kwargs.get("variant"))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter and no model: load the model that the adapter is for, then "
            f"model.load_adapter({str(folder)!r})"
        )
    config, kwargs = _configuration(name_or_path, kwargs)
    chosen = quantization_config
    chosen.quantized, kwargs["config"] = _without_quantization(config)
    if chosen.quantized is not None:
        try:
            methods(chosen.quantized)
        except ValueError as error:
            raise ValueError(f"{folder}, by its configuration: {error}") from error
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = getattr(config, "dtype", None) or torch.bfloat16
    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = AutoModelForCausalLM
    try:
        with _old_objects_left_alone(), _nothing_read_ahead():
            result: Any = kind.from_pretrained(
                name_or_path, **{"use_safetensors": True, **kwargs}, quantization_config=chosen
            )
    except BaseException as error:
        chosen.abandon()
        if (explained := _explained(error, folder, kwargs)) is None:
            raise
        raise explained from error
    return result


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Have the garbage collector look at new objects only: going through those of torch and transformers, again and
    again while a load makes more, took 0.3 of its 1.2 s (FP8 experts of 1.5 GB)."""
    if gc.get_freeze_count():  # somebody else's, which unfreezing would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _nothing_read_ahead() -> Iterator[None]:
    """Have transformers read a tensor when it is asked for: of a quantised checkpoint its threads would read all, and
    those of experts are read here."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _explained(error: BaseException, folder: Path, kwargs: Mapping[str, Any]) -> Exception | None:
    """What to say in the place of two errors of transformers, which name neither file nor remedy."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if type(error) is TypeError and unknown is not None and unknown[1] in kwargs:
        return unknown_option(unknown[1], ", which from_pretrained of transformers does not know either")
    if type(error) is RuntimeError and "ignore_mismatched_sizes" in str(error):
        return ValueError(
            f"weights in {folder} have other shapes than its config.json asks for, as reported above: they do not "
            "belong together, or are damaged; download or copy the checkpoint again"
        )
    return None


def _configuration(name_or_path: str, kwargs: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """A checkpoint's configuration with the values of those arguments that belong to it, and all other arguments."""
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return kwargs["config"], dict(kwargs)
    given = {name: value for name, value in kwargs.items() if name not in ("config", "dtype", "torch_dtype")}
    where = kwargs.get("config") or name_or_path
    config, unused = AutoConfig.from_pretrained(where, return_unused_kwargs=True, **given)
    taken = given.keys() - unused.keys() - set(_HUB)
    return config, {name: value for name, value in kwargs.items() if name not in taken}


def _without_quantization(config: PreTrainedConfig) -> tuple[Mapping[str, Any] | None, PreTrainedConfig]:
    """A checkpoint's quantization_config, and its configuration without."""
    config, found = copy.deepcopy(config), None
    for part in (config, config.get_text_config(decoder=True)):
        if (quantized := part.__dict__.pop("quantization_config", None)) is not None:
            found = found or (quantized if isinstance(quantized, dict) else quantized.to_dict())
    return found, config
