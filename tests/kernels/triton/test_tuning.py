"""Tiles are timed once, kept for later processes, and never trusted blindly. Timers are fake: this needs no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from moebius.hf_plugin.tools import doctor
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.triton import choice, tuning
from moebius.kernels.triton.choice import Kind, Tile
from moebius.kernels.triton.config import TOKEN_CLASSES, built_in, candidates, token_class

GPU = "NVIDIA Imaginary"
SPEC = ExpertSpec(2048, 768)
LAYOUT = RecordLayout.of(SPEC, "int4")


def forget() -> None:
    """As in a new process."""
    choice.tuned.cache_clear()
    choice._chosen.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(choice, "device_name", lambda device: GPU)
    monkeypatch.setattr(choice, "shared_memory", lambda device: 227 << 10)
    forget()
    yield tmp_path / "triton"
    forget()


class FakeTimers:
    """The last candidate of each class is the fastest; counts what was timed."""

    def __init__(self, code: str = "int4") -> None:
        self.timed, self.code = 0, code

    def __call__(self, tokens: str) -> Callable[[Tile], float]:
        order = candidates(self.code, tokens)[::-1]

        def timer(tile: Tile) -> float:
            self.timed += 1
            return 10.0 + order.index(tile)

        return timer


def chosen(tokens: int, spec: ExpertSpec = SPEC, layout: RecordLayout = LAYOUT) -> Tile:
    return choice.tile_for(spec, layout, tokens, torch.device("cuda", 0))


def tune(spec: ExpertSpec = SPEC, layout: RecordLayout = LAYOUT, device: str = GPU) -> int:
    """How many tiles were timed."""
    timers = FakeTimers(layout.code)
    list(tuning.tune(spec, layout, device, timers))
    return timers.timed


def test_the_fastest_tile_is_used_and_outlives_the_process() -> None:
    """The slowest is kept, a class gets another's tile, or what was tuned is only used until the process ends."""
    assert all(chosen(tokens) == built_in("int4", token_class(tokens)) for tokens in (1, 100, 4000))
    assert tune() == sum(len(candidates("int4", tokens)) for tokens in TOKEN_CLASSES)
    for _ in range(2):
        for tokens in (1, 16, 17, 256, 257, 4000):
            assert chosen(tokens) == candidates("int4", token_class(tokens))[-1]
        forget()


def test_a_device_with_little_shared_memory_has_a_tile_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that no launch on a consumer's card can compute, since nobody tuned there."""
    monkeypatch.setattr(choice, "shared_memory", lambda device: 99 << 10)
    assert chosen(4000) == built_in("int4", "prompt", 99 << 10) != built_in("int4", "prompt")
    assert chosen(100) == built_in("int4", "batch")


def test_what_is_known_is_not_timed_again() -> None:
    """Warming up twice takes twice the time, or a second device, format or size is taken for the first."""
    first = tune()
    forget()
    assert tune() == 0
    assert tune(ExpertSpec(2000, 700)) == 0, "these sizes share tiles"
    others = [(ExpertSpec(4096, 768), LAYOUT, GPU), (SPEC, LAYOUT, "AMD Imaginary"), (SPEC, LAYOUT, GPU + " XL")]
    assert [tune(*other) for other in others] == [first] * 3
    assert tune(ExpertSpec(2048, 768, gated=False)) == first
    assert tune(SPEC, RecordLayout.of(SPEC, "bf16")) > 0
    assert chosen(1) == candidates("int4", "decode")[-1], "one kind's tile was lost when another's was written"


def test_other_versions_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that was the fastest for kernels which have changed since."""
    tune()
    for name, value in (("_sources", lambda: "changed"), ("triton", type("Triton", (), {"__version__": "99"}))):
        with monkeypatch.context() as changed:
            changed.setattr(choice, name, value)
            forget()
            assert chosen(1) == built_in("int4", "decode")
    forget()
    assert chosen(1) != built_in("int4", "decode")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[1, 2]",
        lambda text: b'{"tiles": {}}',
        lambda text: text.replace(GPU.encode(), b"Another"),
        lambda text: json.dumps(json.loads(text) | {"tiles": 3}).encode(),
        lambda text: json.dumps(
            json.loads(text) | {"tiles": {k: [3, 5, 7] for k in json.loads(text)["tiles"]}}
        ).encode(),
        lambda text: json.dumps(json.loads(text) | {"tiles": dict.fromkeys(json.loads(text)["tiles"])}).encode(),
    ],
    ids=["empty", "cut off", "not text", "a list", "no facts", "another device's", "no tiles", "no tile", "null"],
)
def test_a_damaged_file_is_ignored_with_a_warning(damage, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception at the first token, a tile that no kernel takes, or a file that can never be mended."""
    tune()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    forget()
    with caplog.at_level(logging.WARNING):
        assert chosen(1) == built_in("int4", "decode")
    assert "ignored" in caplog.text
    assert tune() > 0
    forget()
    assert chosen(1) == candidates("int4", "decode")[-1]


def test_tiles_that_do_not_fit_are_left_out(folder: Path) -> None:
    """One tile too large for the card ends the whole search; or none fits and nobody says so."""
    kind, smallest = Kind.of(GPU, SPEC, LAYOUT, "prompt"), candidates("int4", "prompt")[2]

    def timer(tile: Tile) -> float:
        if tile != smallest:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return 1.0

    assert [timed.tile for timed in tuning.measure(kind, timer)] == [smallest]
    with pytest.raises(RuntimeError, match="no tile"):
        tuning.measure(kind._replace(tokens="decode"), timer)
    assert not folder.exists()


def test_a_failed_write_leaves_the_former_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file, or a temporary one that stays."""
    tune()
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(choice.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        tune(ExpertSpec(64, 64))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_doctor_says_which_tiles_are_in_use() -> None:
    part = doctor._plan_tiles(GPU)
    assert (part.used, part.fallback) == ("built in", True)
    tune()
    part = doctor._plan_tiles(GPU)
    assert not part.fallback
    assert "int4 gated 2048 1024 decode" in part.reason
