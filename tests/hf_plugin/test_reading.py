"""Tensors that are read from their files straight into records: the right bytes, or an error that names the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moebius
from moebius.hf_plugin.checkpoints import in_place, reading
from moebius.hf_plugin.checkpoints.decoding import CodedPiece
from moebius.hf_plugin.checkpoints.intake import Intake
from moebius.hf_plugin.checkpoints.reading import Matrix, Reader, Shards, Stored, runs
from moebius.kernels.experts import ExpertSpec, RecordLayout
from tests import zoo

DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "codes": torch.uint8}


@pytest.fixture
def shards(tmp_path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    tensors = {name: (torch.randn(4, 6, 5) * 9).abs().to(dtype) for name, dtype in DTYPES.items()}
    files = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    save_file({name: tensors[name] for name in ("a", "codes")}, files[0], {"format": "pt"})
    save_file({name: tensors[name] for name in ("b", "c")}, files[1])
    return files, tensors


def test_what_is_read_is_what_was_written(shards: tuple[list[str], dict[str, torch.Tensor]]) -> None:
    """Catches offsets that are off by the header, a part of the wrong tensor, and codes that are taken for numbers."""
    files, tensors = shards
    found, reader = Shards(files).tensors, Reader()
    assert {name: stored.dtype for name, stored in found.items()} == DTYPES
    for name, stored in found.items():
        whole = torch.empty(4, 6, 5, dtype=DTYPES[name])
        reader.read(stored, whole)
        assert torch.equal(whole, tensors[name])
        parts = torch.empty(8, 3, 5, dtype=DTYPES[name])
        for part, into in zip(stored.split((3, 5)), parts, strict=True):
            reader.read(part, into)
        assert torch.equal(parts.view(4, 6, 5), tensors[name])
    reader.close()


def test_runs_are_in_order_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last run that is too short to be read, and a disk that seeks to and fro."""
    monkeypatch.setattr(reading, "RUN", 1000)
    matrices = [
        Matrix(Stored(file, offset, torch.float16, (100,)), "up", offset)
        for offset in (600, 0, 400, 200)
        for file in "ba"
    ]
    found = list(runs(matrices))
    assert [len(run) for run in found] == [5, 3]
    assert [(m.stored.file, m.stored.offset) for run in found for m in run] == [
        (file, offset) for file in "ab" for offset in (0, 200, 400, 600)
    ]


def test_a_file_that_has_become_shorter(shards: tuple[list[str], dict[str, torch.Tensor]]) -> None:
    """Catches memory that is left as it was, and the death of the process that a mapping would bring (SIGBUS)."""
    files, _ = shards
    found = Shards(files)
    os.truncate(files[0], os.path.getsize(files[0]) - 200)
    with pytest.raises(ValueError, match=r"0\.safetensors ends before its tensors do.*again"):
        Reader().read(found.tensors["a"], torch.empty(4, 6, 5))


def _rewritten(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:  # never shorter: transformers has it mapped
        file.write(data)
    os.utime(path, (1, 1))


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


def _longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


@pytest.mark.parametrize("change", [_rewritten, _replaced, _longer, Path.unlink])
@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
@pytest.mark.parametrize(("reader", "method"), [(Reader, "read"), (in_place.InPlace, "_reads")])
def test_files_that_change_during_a_load(
    reader: type, method: str, name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    """Catches a model whose weights are of two checkpoints: the change comes with the first read."""
    zoo.build(name).save_pretrained(tmp_path)
    path, read, lock, changed = tmp_path / "model.safetensors", getattr(reader, method), threading.Lock(), []

    def once(*arguments: Any) -> Any:
        result = read(*arguments)
        with lock:
            if not changed:
                changed.append(change(path))
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reader, method, once)
        patched.setattr(in_place, "slow_to_map", lambda files: "copied" if reader is Reader else None)
        with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
            moebius.from_pretrained(str(tmp_path), device="cpu")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moebius-load")]


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "mixtral", "nemotron_h"])
@pytest.mark.parametrize("options", [{}, {"expert_format": "int8"}, {"cpu_memory": 0.5}])
def test_plain_layouts_are_read_and_not_taken(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a layout that falls back to safetensors' slices, which is slow and nothing would tell."""
    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path / "cache"))
    zoo.build(name).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    monkeypatch.setattr(Intake, "take", lambda *_: pytest.fail("taken"))
    model = moebius.from_pretrained(str(tmp_path / "model"), device="cpu", **options)
    assert moebius.is_patched(model)


def test_another_dtype_than_the_files_is_converted(tmp_path: Path) -> None:
    """Catches bytes of one dtype that are read as another's."""
    stock = zoo.build("qwen3_moe")
    stock.save_pretrained(tmp_path)
    model = moebius.from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    moebius.unpatch(model)
    expected = stock.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    """Catches rows of the next tensor in a matrix."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj cannot be put together.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("dtype", "format", "lies"), [(torch.int8, "mxfp4", False), (torch.uint8, "int8-1x32-e8m0", True)]
)
def test_codes_that_lie_as_in_a_record(dtype: torch.dtype, format: str, lies: bool) -> None:
    """Catches two codes to a byte, whose shapes are those of a record, but whose order is not."""
    columns = 64 if format == "mxfp4" else 32
    layout = RecordLayout.of(ExpertSpec(columns, 4, gated=False), format)
    places = {"weight": Stored("f", 0, dtype, (4, 32)), "scale": Stored("f", 128, torch.uint8, (4, columns // 32))}
    piece = CodedPiece(None, 0, {}, places, {"up": None})  # type: ignore[arg-type]
    assert piece.parts(layout) == ({"up": places["weight"], "up_scale": places["scale"]} if lies else {})
