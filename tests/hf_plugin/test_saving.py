"""Saving a patched model: the files that stock would write, byte for byte, with one layer's experts in memory."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import moebius
from moebius.hf_plugin.checkpoints import converting, in_place, saving
from tests import zoo
from tests.conftest import RunPython
from tests.hf_plugin import quantized_checkpoints
from tests.hf_plugin.helpers import patched
from tests.hf_plugin.peak_memory import LAYER_BYTES, LAYERS, WATCH, needs_linux, save_large

ROOT = Path(__file__).parents[2]
LAYOUTS = ("qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "longcat_flash", "mixtral", "nemotron_h", "diffusion_gemma")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """All tensors of a sharded checkpoint, each where the index says, and the index's facts."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    loaded = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {(name, file) for file, names in loaded.items() for name in names} == set(index["weight_map"].items())
    return {name: loaded[file][name] for name, file in index["weight_map"].items()}, index["metadata"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_hold_what_those_of_stock_hold(name: str, tmp_path: Path) -> None:
    """Stock keeps all tensors that it cut from one in one shard, however large; otherwise shards are the same."""
    model = zoo.build(name)
    model.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    with patched(model, device="cpu"):
        model.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    (stock, facts), (ours, our_facts) = (shards(tmp_path / side) for side in ("stock", "ours"))
    assert our_facts == facts
    assert sorted(ours) == sorted(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    largest = max(tensor.nbytes for tensor in ours.values())
    for file in (tmp_path / "ours").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= max(100_000, largest)


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_are_those_of_stock(name: str, tmp_path: Path) -> None:
    """Every byte of every file: weights, their order, configurations."""
    model = zoo.build(name)
    model.save_pretrained(tmp_path / "stock")
    with patched(model, device="cpu"):
        model.save_pretrained(tmp_path / "ours")
    stock, ours = (files(tmp_path / side) for side in ("stock", "ours"))
    assert sorted(ours) == sorted(stock)
    assert [file for file in stock if ours[file] != stock[file]] == []


def test_variant_base_model_and_second_save(tmp_path: Path) -> None:
    """A part of the model saves itself too; a second save replaces the shards of the first."""
    model = zoo.build("qwen3_moe")
    for side in ("stock", "ours"):
        if side == "ours":
            moebius.patch(model, device="cpu")
        model.save_pretrained(tmp_path / side / "variant", variant="x")
        model.model.save_pretrained(tmp_path / side / "base")
        model.save_pretrained(tmp_path / side / "twice")
    for kind in ("variant", "base", "twice"):
        assert files(tmp_path / "ours" / kind) == files(tmp_path / "stock" / kind)
    moebius.unpatch(model)
    assert "save_pretrained" not in vars(model)


def test_a_lossy_model_saves_what_it_computes_with(tmp_path: Path) -> None:
    """int8 experts become the numbers that their codes stand for; stock then computes the same."""
    model = zoo.build("qwen3_moe")
    ids = torch.arange(6)[None]
    with patched(model, device="cpu", expert_format="int8", keep_original=True):
        model.save_pretrained(tmp_path / "originals")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "originals"), ids), logits(model, ids))
    lossy = moebius.from_pretrained(str(tmp_path / "originals"), device="cpu", expert_format="int8")
    lossy.save_pretrained(tmp_path / "lossy")
    stock, ours = logits(type(model).from_pretrained(tmp_path / "lossy"), ids), logits(lossy, ids)
    assert (stock - ours).abs().max() < 0.02 * stock.abs().max()
    assert not torch.equal(stock, logits(model, ids))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def test_what_cannot_be_saved_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("qwen3_moe")
    usage = saving.shutil.disk_usage(tmp_path)._replace(free=1000)
    with patched(model, device="cpu"):
        with pytest.raises(ValueError, match="upload_folder"):
            model.save_pretrained(tmp_path / "a", push_to_hub=True)
        (tmp_path / "file").touch()
        for no_folder in (tmp_path / "file", ""):
            with pytest.raises(ValueError, match="is no folder"):
                model.save_pretrained(no_folder)
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"takes 0\.00 GiB, and 0\.00 GiB are free .*another disk"):
            model.save_pretrained(tmp_path / "a")
        monkeypatch.setattr(
            saving,
            "revert_weight_conversion",
            lambda model, state: dict.fromkeys(map(str, range(len(state))), torch.empty(1)),
        )
        with pytest.raises(RuntimeError, match="unpatch the model and save it"):
            model.save_pretrained(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SIZES = ("100KB", "50GB")  # several shards, one file


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_a_save_that_fails_leaves_what_was_there(
    before: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the disk is full half-way, and the former checkpoint is deleted, or mixed with the new one."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path / "there", max_shard_size=before)
    was, written = files(tmp_path / "there"), saving.write_safetensors

    def write(file: Any, *rest: Any) -> None:
        written(file, *rest)
        if "-00001-" not in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with patched(zoo.build("qwen3_moe").half(), device="cpu") as model:
        monkeypatch.setattr(saving, "write_safetensors", write)
        for folder in ("there", "new"):
            with pytest.raises(
                OSError, match=f"cannot save the model in .*{folder}: No space left on device; free space"
            ):
                model.save_pretrained(tmp_path / folder, max_shard_size=size)
        assert files(tmp_path / "there") == was
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
        monkeypatch.undo()
        (tmp_path / "there" / "save_pretrained.killed.partial").mkdir()
        for folder in ("there", "new"):
            model.save_pretrained(tmp_path / folder, max_shard_size=size)
    assert files(tmp_path / "there") == files(tmp_path / "new")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"cpu_memory": 0.5}], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "converted"])
def test_into_the_folder_that_it_is_loaded_from(
    kind: str, options: dict[str, Any], size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: files in use are overwritten, or files of the former checkpoint are found in place of the new one's."""
    monkeypatch.setattr(in_place, "slow_to_map", lambda files: None)
    source = tmp_path / "source"
    if kind == "fp8":
        quantized_checkpoints.write("qwen3_moe", source, "fp8")
    else:
        zoo.build("qwen3_moe").bfloat16().save_pretrained(source, max_shard_size="100KB")
    if kind == "converted":
        source = converting.convert(source, tmp_path / "converted", "int8")
    ids = torch.arange(6)[None]
    model = moebius.from_pretrained(str(source), device="cpu", **options)
    expected = logits(model, ids)
    for folder in (tmp_path / "elsewhere", source):
        model.save_pretrained(folder, max_shard_size=size)
    assert torch.equal(logits(model, ids), expected)
    assert files(source) == files(tmp_path / "elsewhere")
    ours, stock = moebius.from_pretrained(str(source), device="cpu"), type(model).from_pretrained(source)
    for again in (ours, stock):
        assert (logits(again, ids) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_stock_weights_in_the_folder_of_a_converted_checkpoint(tmp_path: Path) -> None:
    """Bug: experts of the former checkpoint in a model of the new one."""
    stock, ids = zoo.build("qwen3_moe"), torch.arange(6)[None]
    stock.save_pretrained(tmp_path / "stock")
    folder = converting.convert(tmp_path / "stock", tmp_path / "converted")
    for name, parameter in stock.named_parameters():
        if "experts" in name:
            parameter.data *= 2
    stock.save_pretrained(folder)
    found = logits(moebius.from_pretrained(str(folder), device="cpu"), ids)
    assert (found - logits(stock, ids)).abs().max() <= 1e-5 * found.abs().max()


def test_an_index_that_transformers_does_not_use(tmp_path: Path) -> None:
    """Bug: shards are missed that stock has deleted, where it left their index beside one file."""
    stock = zoo.build("qwen3_moe")
    for size in SIZES:
        stock.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists()
    moebius.from_pretrained(str(tmp_path), device="cpu")


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    model = zoo.build("qwen3_moe")
    with patched(model, device="cpu"):
        state = {"lm_head.weight": torch.ones(3)}
        model.save_pretrained(tmp_path, state_dict=state)
    assert list(load_file(tmp_path / "model.safetensors")) == ["lm_head.weight"]


PEAK = (
    WATCH
    + """
model = moebius.from_pretrained(os.environ["FOLDER"], device="cpu", expert_format="int4")
before = anonymous()
watcher.start()
model.save_pretrained(os.environ["FOLDER"] + "/saved", max_shard_size="100MB")
running = False; watcher.join()
print(peak - before)
"""
)


@pytest.mark.slow
@needs_linux
def test_peak_memory(tmp_path: Path, run_python: RunPython) -> None:
    """Saving holds one layer's experts, 50 MB of 403, while stock would hold them all."""
    save_large(tmp_path)
    peak = int(run_python(PEAK, cwd=tmp_path, path=(ROOT,), FOLDER=str(tmp_path)).stdout)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > LAYERS * LAYER_BYTES
    assert peak < 3 * LAYER_BYTES, peak
