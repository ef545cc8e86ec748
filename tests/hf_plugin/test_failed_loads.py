"""Loads that fail half-way, wherever the error comes from: nothing of them stays, without a garbage collector."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moebius
from moebius.cpu_experts import record_writer
from moebius.hf_plugin.checkpoints import in_place
from moebius.hf_plugin.checkpoints.quantizer import MoebiusQuantizer
from moebius.hf_plugin.running import expert_files
from tests import zoo

Load = Callable[..., Any]


def ours(folder: Path, cpu_memory: Any = "auto", **arguments: Any) -> Any:
    return moebius.from_pretrained(str(folder), device="cpu", cpu_memory=cpu_memory, **arguments)


def theirs(folder: Path, cpu_memory: Any = "auto", **arguments: Any) -> Any:
    config = moebius.MoebiusConfig(device="cpu", cpu_memory=cpu_memory)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


def refused(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """By the quantizer, once transformers knows the room on each device."""
    load(folder, device_map="auto", max_memory={"cpu": "1KiB"}, **options)


def at_the_end(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusQuantizer, "_process_model_after_weight_loading", fail)
    load(folder, **options)


def damaged(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.ones(3, 4, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load(folder, **options)


def no_room(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """For a file of experts; without one, the load goes on and fails later."""
    usage = shutil.disk_usage(folder)._replace(free=0)
    monkeypatch.setattr(record_writer.shutil, "disk_usage", lambda folder: usage)
    refused(load, folder, monkeypatch, **options)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    zoo.build("qwen3_moe").bfloat16().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(in_place, "slow_to_map", lambda files: None)
    monkeypatch.setattr(expert_files, "cache_root", lambda: tmp_path)
    gc.collect()
    gc.disable()
    yield tmp_path / "model"
    gc.enable()


def opened(folder: Path) -> set[Any]:
    """Threads that read, files that are written, and whether the checkpoint is mapped."""
    threads = {thread for thread in threading.enumerate() if thread.name.startswith(("moebius-load", "moebius-read"))}
    maps = Path("/proc/self/maps")
    mapped = {folder} if maps.exists() and str(folder) in maps.read_text() else set[Any]()
    return threads | mapped | set(folder.parent.glob("experts/*"))


@pytest.mark.parametrize("options", [{}, {"cpu_memory": 0.5}], ids=["memory", "disk"])
@pytest.mark.parametrize("fail", [refused, at_the_end, damaged, no_room], ids=lambda fail: fail.__name__)
@pytest.mark.parametrize("load", [ours, theirs], ids=["ours", "theirs"])
def test_nothing_stays(
    load: Load, fail: Callable[..., None], options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: threads, mapped files and a file half-written stay until the garbage collector runs, which may be never."""
    before = opened(folder)
    try:
        fail(load, folder, monkeypatch, **options)
    except (ValueError, OSError, KeyboardInterrupt):
        if load is ours:  # while the traceback, which a notebook keeps, has everything
            assert opened(folder) <= before | {folder}
    else:
        pytest.fail("nothing failed")
    for thread in opened(folder) - before - {folder}:
        thread.join(5)  # of an executor that nobody has any more
    assert opened(folder) <= before
