"""Reading ahead of a load: bounded, in order, ended with it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import moebius
from moebius.hf_plugin.checkpoints import read_ahead
from moebius.hf_plugin.checkpoints.read_ahead import ReadAhead
from tests import zoo

SIZES = (5000, 0, 3001)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and length of all that has been asked for, in small pieces with a small lead."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(read_ahead, "PIECE", 100)
    monkeypatch.setattr(read_ahead, "LEAD", 1000)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, start, count, _advice: found.append((start, count)), False)
    return found


def files(folder: Path) -> list[str]:
    paths = [folder / str(number) for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(bytes(size))
    return [str(path) for path in paths]


def test_no_further_than_the_lead(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    """Catches a whole checkpoint in the page cache, and files that are left out or begun in their middle."""
    ahead = ReadAhead(files(tmp_path))
    for taken in (0, 50, 4500, ahead.nbytes):
        ahead.advance(taken)
        ahead._pool.submit(int).result()  # after all that has been submitted
        assert min(taken + 1000, ahead.nbytes) <= ahead.position <= taken + 1100
    ahead.close()
    assert ahead.position == ahead.nbytes == sum(SIZES)
    assert asked == [(start, 100) for size in SIZES for start in range(0, size, 100)]


def test_an_end_in_between_leaves_no_thread_and_no_file(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    threads, open_files = set(threading.enumerate()), len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
    ahead = ReadAhead(files(tmp_path))
    ahead._pool.submit(int).result()
    ahead.close()
    assert 0 < ahead.position < ahead.nbytes
    assert set(threading.enumerate()) == threads
    assert not open_files or len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("broken", [False, True])
def test_a_load_asks_for_all_and_leaves_no_thread(broken: bool, tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    """Catches a read-ahead that stops in the middle of a load, and a thread that outlives one, or a failed one."""
    others = set(threading.enumerate())  # as of a load that failed, and whose model waits for the garbage collector
    zoo.build("gpt_oss").save_pretrained(tmp_path)  # transposed, so that it comes through transformers
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    if broken:
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(Exception, match=r"model\.safetensors cannot be read"):
            moebius.from_pretrained(str(tmp_path), device="emulated")
    else:
        moebius.unpatch(moebius.from_pretrained(str(tmp_path), device="emulated"))
        assert asked == [(start, 100) for start in range(0, size, 100)]
    mine = set(threading.enumerate()) - others
    assert not [thread for thread in mine if thread.name.startswith("moebius-read-ahead")]
