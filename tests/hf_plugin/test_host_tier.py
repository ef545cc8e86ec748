"""A model larger than the memory for its experts: same results, bounded memory, counters that explain the rate."""

from __future__ import annotations

import copy
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import moebius
from moebius.gpu_cache.policy import Static
from moebius.hf_plugin.running import expert_files
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, greedy, prompt

EXPERT = 3 * 64 * 32 * 4  # bytes of an expert of zoo's qwen3_moe: 2 layers of 8


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(expert_files, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "experts"


def saved(name: str, folder: Path) -> PreTrainedModel:
    model = zoo.build(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return moebius.from_pretrained(str(folder), **({"device": "cpu", "cpu_memory": 0.5} | options))


PLACES: dict[str, dict[str, Any]] = {"cpu": {}, "emulated": {"device": "emulated", "gpu_memory": 0.25}}


@pytest.mark.slow
@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "longcat_flash", "muse_spark"])
def test_half_of_the_experts_in_memory(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Logits, tokens and weights are those of stock, for kernels and for torch code, with biases and surplus rows."""
    stock = saved(name, tmp_path)
    ids = prompt(stock)
    model = load(tmp_path, **options)
    for _ in range(3):
        assert_close(helpers.logits(model, ids), helpers.logits(stock, ids))
    assert greedy(model, ids) == greedy(stock, ids)
    sums = moebius.stats(model).sums
    assert sums.disk_bytes > 0
    assert sums.ram_misses > 0
    assert sums.ram_hits > 0
    moebius.unpatch(model)
    restored, original = model.state_dict(), stock.state_dict()
    assert all(torch.equal(restored[key], original[key]) for key in original)


def test_one_expert_in_memory(tmp_path: Path) -> None:
    """A step that needs more experts than there are slots goes in rounds."""
    stock = saved("qwen3_moe", tmp_path)
    ids = prompt(stock, 2, 24)
    model = load(tmp_path, cpu_memory=EXPERT)
    assert_close(helpers.logits(model, ids), helpers.logits(stock, ids))
    assert greedy(model, ids) == greedy(stock, ids)
    assert moebius.stats(model).sums.disk_reads >= 16


def test_experts_that_static_does_not_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that refuses what a step needs, once it has learned what to keep: the step waited for ever."""
    monkeypatch.setattr(Static, "rule", replace(Static.rule, frozen_after=3))
    stock = saved("qwen3_moe", tmp_path)
    model = load(tmp_path, cpu_memory=0.25, cache_policy="static")
    for seed in range(8):
        ids = prompt(stock, 1, 8) + seed
        assert_close(helpers.logits(model, ids), helpers.logits(stock, ids))


def test_statistics_explain_the_rate(tmp_path: Path) -> None:
    """Every read is counted once, with its bytes; experts that were not read were in memory."""
    model = load(saved_only("qwen3_moe", tmp_path), cpu_memory=0.75, prefetch=False)
    ids = prompt(model, 1, 4)
    for _ in range(4):
        helpers.logits(model, ids)
    stats = moebius.stats(model)
    sums = stats.sums
    assert sums.disk_bytes == sums.disk_reads * EXPERT
    assert sums.disk_reads == sums.ram_misses
    assert sums.ram_hits > 0
    assert 0 < sums.stall_ms <= sums.cpu_ms
    assert "experts were in memory" in str(stats)
    moebius.reset_stats(model)
    assert moebius.stats(model).sums.disk_reads == 0


def saved_only(name: str, folder: Path) -> Path:
    saved(name, folder)
    return folder


@pytest.mark.usefixtures("prefetching")
def test_reads_ahead_what_the_next_layer_needs(tmp_path: Path) -> None:
    """Catches a tier on the CPU alone whose predictor is off."""
    model = load(saved_only("qwen3_moe", tmp_path))
    for token in range(40):
        helpers.logits(model, torch.tensor([[token]]))
    sums = moebius.stats(model).sums
    assert sums.read_ahead > 0
    assert sums.read_ahead_used > 0


def test_reading_ahead_rests_where_reads_cost_less(tmp_path: Path) -> None:
    """Records of 24 KB that are read in less time than a router takes to answer; statistics that do not say so."""
    model = load(saved_only("qwen3_moe", tmp_path))
    for token in range(70):
        helpers.logits(model, torch.tensor([[token]]))
    stats = moebius.stats(model)
    assert stats.sums.prefetching == 0
    assert any("prefetching rests: " in note for note in stats.notes)
    assert stats.sums.forecasts > 0


def test_the_file_is_written_once_and_found_again(tmp_path: Path, cache_folder: Path) -> None:
    """Another format or a changed checkpoint has a file of its own; the same one is not written again."""
    folder = saved_only("qwen3_moe", tmp_path / "model")
    expected = helpers.logits(load(folder), torch.arange(4)[None])
    [file] = cache_folder.iterdir()
    written = file.stat()
    again = load(folder)
    assert torch.equal(helpers.logits(again, torch.arange(4)[None]), expected)
    assert list(cache_folder.iterdir()) == [file]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    load(folder, expert_format="int8")
    assert len(list(cache_folder.iterdir())) == 2


def test_files_that_can_never_be_used_again_go_when_another_is_written(tmp_path: Path, cache_folder: Path) -> None:
    """Catches a folder that grows for ever: of a checkpoint that changed, one that is gone, and killed writers."""
    folders = [saved_only("qwen3_moe", tmp_path / name) for name in ("kept", "changed", "gone")]
    models = [load(folder) for folder in folders]
    want = helpers.logits(models[1], torch.arange(4)[None])
    kept = next(cache_folder.glob("kept-*"))
    assert [file.usable for file in expert_files.cached_files()] == [True] * 3
    os.utime(folders[1] / "model.safetensors", ns=(0, 0))
    shutil.rmtree(folders[2])
    (cache_folder / "other-123.safetensors.abc.partial").touch()
    (cache_folder / "damaged.safetensors").write_bytes(b"123")
    found = {Path(file.path).name.partition("-")[0]: file.usable for file in expert_files.cached_files()}
    assert found == {"changed": False, "damaged.safetensors": False, "gone": False, "kept": True}
    assert {file.nbytes for file in expert_files.cached_files() if file.usable} == {kept.stat().st_size}
    load(folders[1])
    assert sorted(path.name.partition("-")[0] for path in cache_folder.iterdir()) == ["changed", "kept"]
    assert_close(helpers.logits(models[1], torch.arange(4)[None]), want)  # its file has no name, but is open


def test_experts_that_have_no_room_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a model that is slow for want of memory, which only its statistics would show."""
    folder = saved_only("qwen3_moe", tmp_path / "model")
    memory = psutil.virtual_memory()._replace(available=int((expert_files.AUTO_RESERVE_BYTES + 10 * EXPERT) / 0.9))
    monkeypatch.setattr(expert_files.psutil, "virtual_memory", lambda: memory)
    model = load(folder, cpu_memory="auto")
    helpers.logits(model, prompt(model))
    assert moebius.stats(model).sums.disk_reads > 0
    assert len(re.findall("host memory has room for .* the others are read from .*safetensors", caplog.text)) == 1


def test_a_damaged_cache_file_is_an_error(tmp_path: Path, cache_folder: Path) -> None:
    """Never a model with wrong weights: a flipped bit is found when its expert is read."""
    folder = saved_only("qwen3_moe", tmp_path / "model")
    load(folder)
    [file] = cache_folder.iterdir()
    data = bytearray(file.read_bytes())
    data[4096 + EXPERT // 2] ^= 1
    file.unlink()
    file.write_bytes(data)
    model = load(folder)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: expert 0 of model.layers.0.* delete it"):
        helpers.logits(model, prompt(model, 4, 32))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: expert 0 of model.layers.0.* delete it"):
        load(folder, **PLACES["emulated"])  # uploads take records where they are mapped
    file.unlink()
    file.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        load(folder)


def test_a_folder_that_cannot_be_written(tmp_path: Path, cache_folder: Path) -> None:
    folder = saved_only("qwen3_moe", tmp_path / "model")
    cache_folder.parent.mkdir()
    cache_folder.touch()
    with pytest.raises(OSError, match=r"cannot write .*experts.*a folder that can be written .*MOEBIUS_CACHE_DIR"):
        load(folder)


def test_bounds_that_cannot_be_kept_or_need_no_file(tmp_path: Path, cache_folder: Path) -> None:
    folder = saved_only("qwen3_moe", tmp_path / "model")
    with pytest.raises(ValueError, match=r"cpu_memory=100 is 100 bytes, less than one expert .*give more"):
        load(folder, cpu_memory=100)
    model = load(folder, cpu_memory=1.0)
    assert not cache_folder.exists()
    assert moebius.stats(model).sums.disk_reads == 0


def test_threads_and_memory_come_back(tmp_path: Path) -> None:
    """Catches readers that outlive the model that they read for."""

    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "moebius-read"}

    before = readers()
    model = load(saved_only("qwen3_moe", tmp_path))
    helpers.logits(model, prompt(model))
    assert readers() - before
    moebius.unpatch(model)
    assert not readers() - before


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    """Catches a conversion that brings all experts into memory."""
    model = load(saved_only("qwen3_moe", tmp_path))
    with pytest.raises(RuntimeError, match=r"are in a file, as fp32, .* load the model with dtype='bfloat16'"):
        model.bfloat16()


def test_copies_have_memory_of_their_own(tmp_path: Path) -> None:
    """Catches a copy whose tier is closed with its original, or that was never opened."""

    model = load(saved_only("qwen3_moe", tmp_path))
    ids = prompt(model)
    want = helpers.logits(model, ids)
    twin = copy.deepcopy(model)
    moebius.unpatch(model)
    assert_close(helpers.logits(twin, ids), want)
    assert moebius.stats(twin).sums.disk_reads > 0
    moebius.unpatch(twin)
