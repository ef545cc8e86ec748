"""A file of records: what is read is what was written, or an error that names the file."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moebius.cpu_experts import record_writer
from moebius.cpu_experts.direct_reads import DirectReads
from moebius.cpu_experts.record_file import LayerFacts, RecordFile
from moebius.cpu_experts.record_writer import RecordWriter
from moebius.kernels.experts import RECORD_ALIGNMENT, RecordLayout

LAYERS = {
    "model.layers.0.mlp.experts": LayerFacts(RecordLayout("int4", 40, 24, True, True), 5),
    "model.layers.1.mlp.experts": LayerFacts(
        RecordLayout("bf16", 64, 33, False, False), 3, {"up_proj": (torch.float32, (2, 7))}
    ),
}
FACTS = {"source": "a checkpoint"}


def contents(seed: int = 0) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, layer in LAYERS.items():
        shape = (layer.num_experts, layer.layout.nbytes)
        records = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        extras = {key: torch.randn(shape, generator=generator) for key, (_, shape) in layer.extras.items()}
        result[name] = (records, extras)
    return result


def write(path: Path, seed: int = 0) -> Path:
    with RecordWriter(path, LAYERS, FACTS) as writer:
        for name, (records, extras) in reversed(contents(seed).items()):
            writer.write(name, records, extras)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records") / "experts.safetensors")


def test_read_is_what_was_written(good: Path) -> None:
    """By mapping, by reading, and by safetensors itself, which knows nothing of us."""
    file, stock = RecordFile(good), load_file(good)
    assert file.layers == LAYERS
    assert file.facts == FACTS
    for name, (records, extras) in contents().items():
        mapped = file.records(name)
        assert mapped.data_ptr() % RECORD_ALIGNMENT == 0
        assert torch.equal(mapped, records)
        assert torch.equal(stock[name], records)
        target = torch.zeros(records.shape[1], dtype=torch.uint8)
        for number in range(len(records)):
            file.read(mapped[number], target)
            assert torch.equal(target, records[number])
        assert all(torch.equal(tensor, extras[key]) for key, tensor in file.extras(name).items())
    assert not os.access(good, os.W_OK) or os.getuid() == 0


def pages(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


@pytest.mark.parametrize("refusal", ["open", "preadv", None])
def test_direct_reads(refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records at odd places of pages, of the file or of memory; a file system that refuses direct reads."""
    path = tmp_path / "x"
    data = torch.randint(0, 256, (5 * 4096 + 100,), dtype=torch.uint8)
    path.write_bytes(data.numpy().tobytes())

    def refuse(*args: Any) -> NoReturn:
        raise OSError(errno.EINVAL, "Invalid argument")

    with path.open("rb") as file, monkeypatch.context() as context:
        if refusal == "open":
            context.setattr(os, "open", refuse)
        reads = DirectReads(file.fileno(), path)
        if refusal == "preadv":
            context.setattr(os, "preadv", refuse)
        for offset, count, shift in [(4096, 8192, 0), (4096, 8192, 64), (64, 128, 0), (4000, 9000, 0), (20000, 580, 8)]:
            target = pages(12288)[shift : shift + count]
            assert reads.read(offset, target.numpy()) is (refusal is None)
            assert torch.equal(target, data[offset : offset + count]) is (refusal is None)
        assert not reads.read(20000, pages(1000).numpy()), "past the end"


def test_an_unfinished_file_has_no_name(tmp_path: Path) -> None:
    """Catches a half-written file that the next start takes for a whole one."""
    path = tmp_path / "experts.safetensors"
    writer = RecordWriter(path, LAYERS, FACTS).__enter__()
    name = next(iter(LAYERS))
    writer.write(name, *contents()[name])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []
    writer = RecordWriter(path, LAYERS, FACTS).__enter__()
    del writer
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from tests.cpu_experts.test_record_file import *
with RecordWriter(Path(sys.argv[1]), LAYERS, FACTS) as writer:
    name = next(iter(LAYERS))
    writer.write(name, *contents()[name])
    os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Its partial file is not taken for the file, the next writer removes it, and leaves that of a live one alone."""
    path = tmp_path / "experts.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with RecordWriter(path, LAYERS, FACTS) as slow:
        write(path)
        assert len(list(tmp_path.iterdir())) == 2, "the other's partial file is gone"
        for name, (records, extras) in contents(1).items():
            slow.write(name, records, extras)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(RecordFile(path).records(name), contents(1)[name][0])


def test_replaced_while_mapped(tmp_path: Path) -> None:
    """Who has mapped the file keeps what he has; a file that is cut short where it lies is an error."""
    path = write(tmp_path / "experts.safetensors")
    file = RecordFile(path)
    write(path, seed=1)
    for name, (records, _) in contents().items():
        assert torch.equal(file.records(name), records)
    file.verify()
    file.mapped.check_unchanged()
    replaced = RecordFile(path)
    path.chmod(0o644)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=r"experts\.safetensors is damaged: it ends at byte .* convert the checkpoint"):
        replaced.verify()
    with pytest.raises(ValueError, match=r"was changed while it was in use.* load the model again"):
        replaced.mapped.check_unchanged()


@pytest.mark.parametrize("threads", [1, 3])
def test_verifying_reads_all_of_the_file(threads: int, good: Path, tmp_path: Path) -> None:
    """Catches records that no thread reads: each one is damaged in turn."""
    plan = RecordFile(good)._plan
    for piece in plan.pieces.values():
        for number in range(piece.count):
            data = bytearray(good.read_bytes())
            data[piece.start + number * piece.nbytes + piece.nbytes // 2] ^= 1
            path = tmp_path / "experts.safetensors"
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"experts\.safetensors is damaged: .* checksum"):
                RecordFile(path).verify(threads)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = record_writer.shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(record_writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"cannot write .*experts\.safetensors .*0\.00 GiB are free.*another disk"):
        write(tmp_path / "experts.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's bytes may take the space between the check and the write."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_writer.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device\); the file needs .*free space"):
        write(tmp_path / "experts.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/experts\.safetensors .*a folder that can be written"):
        write(tmp_path / "file" / "experts.safetensors")


@pytest.mark.parametrize("where", ["first record", "last record", "extra", "checksums"])
def test_a_flipped_bit_is_found(where: str, good: Path, tmp_path: Path) -> None:
    """Catches wrong weights: every byte of the file counts in a checksum."""
    data, names = bytearray(good.read_bytes()), list(LAYERS)
    offsets = {key: value["data_offsets"] for key, value in header_of(data).items() if key != "__metadata__"}
    start = 8 + int.from_bytes(data[:8], "little")
    places = {
        "first record": offsets[names[0]][0],
        "last record": offsets[names[1]][1] - 1,
        "extra": offsets[f"{names[1]}|up_proj"][0],
        "checksums": offsets["checksums"][1] - 1,
    }
    data[start + places[where]] ^= 16
    path = tmp_path / "experts.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"experts\.safetensors is damaged: .* checksum .*convert"):
        read_all(path)


def header_of(data: bytes | bytearray) -> dict[str, dict[str, list[int]]]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def read_all(path: Path) -> None:
    file = RecordFile(path)
    file.verify()
    for name in file.layers:
        file.extras(name)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_headers_are_refused(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Catches a crash, a hang, a giant allocation or wrong weights from a header with other numbers, words or bytes."""
    original = good.read_bytes()
    length = int.from_bytes(original[:8], "little")
    text = original[8 : 8 + length].rstrip()
    how = data.draw(st.sampled_from(["bytes", "number", "word", "cut", "length", "nothing but"]))
    if how == "bytes":
        damaged = bytearray(original)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, 8 + len(text) - 1))] ^= data.draw(st.integers(1, 255))
    elif how in ("number", "word"):
        pieces = text.split(b":")
        chosen = data.draw(st.integers(1, len(pieces) - 1))
        values = [b"-1", b"0", b"99999999999999999999", b"1e9", b"null", b"[]", b"{}", b'"bf16"', b"true", b"[[[["]
        pieces[chosen] = data.draw(st.sampled_from(values)) + pieces[chosen].lstrip(b"0123456789[")
        damaged = bytearray(original[:8] + b":".join(pieces).ljust(length)[:length] + original[8 + length :])
    elif how == "cut":
        damaged = bytearray(original[: data.draw(st.integers(0, len(original) - 1))])
    elif how == "length":
        damaged = bytearray(data.draw(st.binary(min_size=8, max_size=8)) + original[8:])
    else:
        damaged = bytearray(data.draw(st.binary(max_size=200)))
    if damaged == original:
        return
    path = tmp_path_factory.mktemp("damaged") / "experts.safetensors"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"experts\.safetensors (is damaged: .*|has version .*)convert the"):
        read_all(path)
