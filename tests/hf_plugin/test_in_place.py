"""Experts used in the checkpoint's mapped files: stock's numbers, nothing written, or a reason why they are not."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import moebius
from moebius.cpu_experts.mapped_file import MappedFile
from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.checkpoints import in_place
from tests import zoo
from tests.conftest import RunPython
from tests.hf_plugin import quantized_checkpoints
from tests.hf_plugin.helpers import assert_close, assert_same_weights, greedy, logits, prompt, weights

PLAIN = ("qwen3_moe", "granitemoe", "mixtral", "nemotron_h")  # two a tensor for each expert, two packed; one ungated
USED = "are used in the checkpoint's files"
slow_to_map = in_place.slow_to_map  # the tests of loading replace it


@pytest.fixture(autouse=True)
def large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "slow_to_map", lambda files: None)


def saved(name: str, folder: Path, **kwargs: Any) -> PreTrainedModel:
    stock = zoo.build(name)
    stock.save_pretrained(folder, **kwargs)
    return stock


def mapped(folder: Path, **options: Any) -> PreTrainedModel:
    model = moebius.from_pretrained(str(folder), device="cpu", **options)
    assert [note for note in moebius.stats(model).notes if USED in note]
    return model


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["100KB", "1GB"])
def test_same_numbers_as_from_memory(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the tensors of another expert or shard, and a copy: no memory is allocated for experts."""
    stock = zoo.build(name).to(dtype)
    stock.save_pretrained(tmp_path, max_shard_size=shard)
    ids = prompt(stock)
    with monkeypatch.context() as patched:
        patched.setattr(ExpertStore, "empty", lambda *_: pytest.fail("allocated"))
        model = mapped(tmp_path, dtype=dtype)
        got = logits(model, ids)
    with monkeypatch.context() as patched:
        patched.setattr(in_place, "slow_to_map", lambda files: "because")
        copied = moebius.from_pretrained(str(tmp_path), device="cpu", dtype=dtype)
    assert [note for note in moebius.stats(copied).notes if note.endswith("because")]
    assert torch.equal(got, logits(copied, ids))
    if dtype == torch.float32:
        assert_close(got, logits(stock, ids))
        assert greedy(model, ids) == greedy(stock, ids)
    assert moebius.stats(model).expert_bytes == moebius.stats(copied).expert_bytes
    assert_same_weights(model, weights(type(stock).from_pretrained(tmp_path, dtype=dtype)))


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_the_checkpoint_is_never_written(name: str, tmp_path: Path) -> None:
    """Catches parameters, copies or state dicts that are the file, so that training would write a checkpoint."""
    stock = saved(name, tmp_path)
    before, ids = bytes_of(tmp_path), prompt(stock)
    model = mapped(tmp_path)
    want, twin = logits(model, ids), copy.deepcopy(model)
    for key, tensor in model.state_dict().items():
        if "experts" in key:
            tensor.zero_()
    with pytest.raises(RuntimeError, match=r"moebius\.unpatch\(model\)"):
        model(input_ids=ids, labels=ids).loss.backward()
    moebius.unpatch(model)
    assert_same_weights(model, weights(stock))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, ids), want)
    twin.half().float()
    assert not [note for note in moebius.stats(twin).notes if USED in note]
    moebius.unpatch(twin)
    assert bytes_of(tmp_path) == before


def test_unpatching_gives_the_mapping_back(tmp_path: Path) -> None:
    """Catches files that stay open, and address space that stays taken."""
    saved("qwen3_moe", tmp_path)
    model = mapped(tmp_path)
    logits(model, prompt(model))
    assert _mappings(tmp_path) == 2, "the other one is stock's"
    moebius.unpatch(model)
    gc.collect()
    assert _mappings(tmp_path) == 1


def _mappings(folder: Path) -> int:
    return sum(f"{folder}/model.safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines())


def _at_odd_bytes(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padding = b" " * (1 + length % 2)
    path.write_bytes(
        (length + len(padding)).to_bytes(8, "little") + data[8 : 8 + length] + padding + data[8 + length :]
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_at_odd_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches aligned loads, and offsets reckoned in numbers: a safetensors header may have any length."""
    stock = zoo.build(name).to(dtype)
    stock.save_pretrained(tmp_path)
    ids = prompt(stock)
    want = logits(mapped(tmp_path, dtype=dtype), ids)
    _at_odd_bytes(tmp_path / "model.safetensors")
    model = mapped(tmp_path, dtype=dtype)
    assert torch.equal(logits(model, ids), want)
    moebius.unpatch(model)
    assert_same_weights(model, weights(stock))


@pytest.mark.parametrize(
    ("name", "method"),
    [("qwen3_moe", "fp8"), ("nemotron_h", "fp8"), ("qwen3_moe", "int8"), ("mixtral", "float8")],
)
def test_codes_of_eight_bits(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scales of another expert or matrix, aligned loads of them, and a copy."""
    quantized_checkpoints.write(name, tmp_path, method)
    stock = zoo.build(name)
    with monkeypatch.context() as patched:
        patched.setattr(in_place, "slow_to_map", lambda files: "because")
        copied = moebius.from_pretrained(str(tmp_path), device="cpu")
    ids = prompt(stock)
    want = logits(copied, ids)
    before = weights(moebius.unpatch(copied))
    monkeypatch.setattr(ExpertStore, "empty", lambda *_: pytest.fail("allocated"))
    assert torch.equal(logits(mapped(tmp_path), ids), want)
    _at_odd_bytes(tmp_path / "model.safetensors")
    model = mapped(tmp_path)
    assert torch.equal(logits(model, ids), want)
    moebius.unpatch(model)
    assert_same_weights(model, before)


def _nan_code(tensors: quantized_checkpoints.Tensors) -> None:
    name = next(name for name, tensor in tensors.items() if "experts.3" in name and tensor.itemsize == 1)
    tensors[name].view(torch.uint8)[-1, -1] = 0xFF


def _infinite_scale(tensors: quantized_checkpoints.Tensors) -> None:
    name = next(name for name in tensors if "experts.3" in name and name.endswith("scale_inv"))
    tensors[name][-1, -1] = torch.inf


@pytest.mark.parametrize("change", [_nan_code, _infinite_scale])
def test_codes_are_checked(change: Callable[[quantized_checkpoints.Tensors], None], tmp_path: Path) -> None:
    """Catches numbers that nobody has looked at since nobody copied them."""
    quantized_checkpoints.write("qwen3_moe", tmp_path, "fp8", change)
    with pytest.raises(ValueError, match=r"experts\.3\..*model\.safetensors.*(NaN|infinite)"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("shard", ["100KB", "200KB", "300KB"])
def test_saving_over_the_files_in_use(shard: str, tmp_path: Path) -> None:
    """Catches a file that is cut short or overwritten while experts are computed in it."""
    stock = saved("qwen3_moe", tmp_path, max_shard_size="200KB")
    model, ids = mapped(tmp_path), prompt(stock)
    want = logits(model, ids)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert torch.equal(logits(model, ids), want)
    assert torch.equal(logits(mapped(tmp_path), ids), want)
    assert_same_weights(type(stock).from_pretrained(tmp_path), weights(stock))
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), max_shard_size=shard)  # stock's own way
    assert torch.equal(logits(model, ids), want)
    moebius.unpatch(model)
    assert_same_weights(model, weights(stock))


def _rewritten(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:  # never shorter: it is mapped
        file.write(data)
    os.utime(path, (1, 1))


def _longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


@pytest.mark.parametrize("change", [_rewritten, _longer])
def test_a_file_that_is_written_to(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Catches numbers of half a checkpoint; a model that loses its experts to an unpatch that fails."""
    saved("qwen3_moe", tmp_path)
    model = mapped(tmp_path)
    change(tmp_path / "model.safetensors")
    for use in (
        lambda: logits(model, prompt(model)),
        lambda: moebius.unpatch(model),
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was in use"):
            use()
    assert moebius.is_patched(model)
    assert not (tmp_path / "saved").exists()


CUT = """
import os, sys
import torch, moebius
from moebius.hf_plugin.checkpoints import in_place
in_place.slow_to_map = lambda files: None
model = moebius.from_pretrained(os.getcwd(), device="cpu")
ids = torch.arange(6)[None]
model(ids)
os.truncate("model.safetensors", 0)
for use in (model, model.generate, lambda _: model.save_pretrained("saved"), lambda _: moebius.unpatch(model)):
    try:
        use(ids)
        sys.exit("no error")
    except ValueError as error:
        assert "model.safetensors was changed while it was in use" in str(error)
"""


@pytest.mark.slow
def test_a_file_that_is_cut_short(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: the process ends (SIGBUS), as it does with stock: embedding and attention touch the file before experts."""
    saved("qwen3_moe", tmp_path)
    run_python(CUT, cwd=tmp_path, path=(Path(__file__).parents[2],))


def test_a_copy_has_a_check_of_its_own(tmp_path: Path) -> None:
    """Bug: unpatching a copy leaves the check, or takes that of the original."""
    saved("qwen3_moe", tmp_path)
    model = mapped(tmp_path)
    copied = copy.deepcopy(model)
    assert len(copied._forward_pre_hooks) == len(model._forward_pre_hooks) == 1
    moebius.unpatch(copied)
    (tmp_path / "model.safetensors").touch()
    logits(copied, prompt(copied))
    with pytest.raises(ValueError, match="was changed while it was in use"):
        logits(model, prompt(model))


def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    """Catches a model that follows the name of its file."""
    stock = saved("qwen3_moe", tmp_path)
    model, ids = mapped(tmp_path), prompt(stock)
    want = logits(model, ids)
    (tmp_path / "other").write_bytes(b"nothing")
    os.replace(tmp_path / "other", tmp_path / "model.safetensors")
    assert torch.equal(logits(model, ids), want)
    moebius.unpatch(model)
    assert_same_weights(model, weights(stock))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a load that ends before its files are in memory, and a model with holes."""
    saved("qwen3_moe", tmp_path)

    def fail(file: MappedFile, start: int, end: int) -> None:
        raise OSError(errno.EIO, "Input/output error", str(file.path))

    monkeypatch.setattr(MappedFile, "populate", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*model\.safetensors"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_a_load_that_fails_reads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches threads that go on to read hundreds of gigabytes for nobody."""
    saved("qwen3_moe", tmp_path)
    started, resume, seen = threading.Event(), threading.Event(), []

    def wait(file: MappedFile, start: int, end: int) -> None:
        seen.append(start)
        started.set()
        resume.wait()

    monkeypatch.setattr(MappedFile, "populate", wait)
    monkeypatch.setattr(in_place, "RUN", 4096)  # the file has a hundred of them
    intake = in_place.InPlace({}, 1, [str(tmp_path / "model.safetensors")], lambda held: None)
    started.wait()
    pool = intake._arrival._pool
    del intake
    resume.set()
    pool.shutdown()
    assert len(seen) <= 8


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpt_oss", {}), ("dbrx", {}), ("longcat_flash", {}), ("qwen3_moe", {"dtype": torch.bfloat16})],
    ids=["interleaved", "flat", "surplus", "dtype"],
)
def test_what_kernels_cannot_read_is_copied_and_said(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Catches a copy that nothing tells of."""
    stock = saved(name, tmp_path)
    model = moebius.from_pretrained(str(tmp_path), device="cpu", **options)
    assert [note for note in moebius.stats(model).notes if "were copied out of the checkpoint's files: they" in note]
    if not options:
        assert_close(logits(model, prompt(stock)), logits(stock, prompt(stock)))


@pytest.mark.parametrize("method", ["mxfp4", "gptq", "int4"])
def test_codes_in_another_order_are_copied_and_said(method: str, tmp_path: Path) -> None:
    """Catches nibbles that are taken for those of a record."""
    if method == "mxfp4":
        quantized_checkpoints.write_mxfp4(tmp_path)
    else:
        quantized_checkpoints.write("qwen3_moe", tmp_path, method)
    model = moebius.from_pretrained(str(tmp_path), device="cpu")
    assert [note for note in moebius.stats(model).notes if "were copied out of the checkpoint's files: they" in note]


@pytest.mark.parametrize("options", [{"device": "emulated"}, {"device": "cpu", "expert_format": "int8"}])
def test_a_device_and_another_format_have_records(options: dict[str, Any], tmp_path: Path) -> None:
    """Catches uploads of what is no record."""
    stock = saved("qwen3_moe", tmp_path)
    model = moebius.from_pretrained(str(tmp_path), **options)
    assert not [note for note in moebius.stats(model).notes if "checkpoint's files" in note]
    logits(model, prompt(stock))


# ---- where mapped experts are as fast as others


def _machine(monkeypatch: pytest.MonkeyPatch, release: str, mounts: dict[str, str], support: Path) -> None:
    partitions = [types.SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=release))
    monkeypatch.setattr(in_place, "_SUPPORT", support)


@pytest.mark.parametrize(
    ("kind", "release", "fast"),
    [
        ("ext4", "6.15.9-generic", False),
        ("ext4", "6.16.0", True),
        ("ext4", "7.0.1", True),
        ("xfs", "5.17.3", False),
        ("xfs", "5.18.0-rc2", True),
        ("btrfs", "6.18.1", False),
        ("btrfs", "7.2.0", True),
        ("overlay", "7.2.0", False),
    ],
)
def test_file_systems_with_large_pages(
    kind: str, release: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches versions compared as text, and a file system that is taken for another."""
    _machine(monkeypatch, release, {"/": "tmpfs", str(tmp_path): kind, f"{tmp_path}x": "zfs"}, tmp_path)
    (tmp_path / "model").mkdir()
    reason = slow_to_map([str(tmp_path / "model" / "model.safetensors")])
    assert reason is None if fast else f"{kind} of Linux {release}" in str(reason)


def test_a_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the file system of the link, where a cache of downloads links to its files."""
    for folder in ("links", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "files" / "a")
    _machine(monkeypatch, "6.18", {"/": "ext4", str(tmp_path / "files"): "nfs"}, tmp_path)
    assert "nfs" in str(slow_to_map([str(tmp_path / "links" / "a")]))


def test_a_kernel_without_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a system other than Linux, or a small kernel."""
    _machine(monkeypatch, "6.18", {"/": "ext4"}, tmp_path / "absent")
    assert "no large pages" in str(slow_to_map([str(tmp_path / "a")]))
