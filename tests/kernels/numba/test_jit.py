"""Compilation: nothing at import, kept on disk, and never stale."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.kernels.numba import jit

_ROOT = Path(__file__).parents[3]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def test_import_compiles_nothing(run_python: RunPython) -> None:
    """Bug: a decorator with a signature makes `import moebius` take seconds."""
    code = (
        "from numba.core import event\n"
        "with event.install_recorder('numba:compile') as seen:\n"
        "    import moebius.cpu_experts.executor, moebius.kernels.numba.work\n"
        "print(len(seen.buffer))"
    )
    assert run_python(code, cwd=_ROOT).stdout.strip() == "0"


_PROBE = """
from moebius.kernels.numba.jit import entry
from moebius.kernels.numba.memory import wait_briefly
@entry("int64(int64)")
def probe(x):
    return wait_briefly(x)
"""


@pytest.mark.slow
def test_an_edited_callee_is_noticed_and_an_unchanged_one_is_loaded(tmp_path: Path, run_python: RunPython) -> None:
    """Bug: Numba's cache looks at the file of the cached function only and runs yesterday's helper."""
    for part in ("moebius", "kernels"):
        shutil.copytree(_ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").touch()  # marks a checkout for moebius/__init__.py
    (tmp_path / "kernels/numba/probe.py").write_text(_PROBE)

    def answer() -> str:
        done = run_python(code, cwd=tmp_path, path=(tmp_path,), MOEBIUS_CACHE_DIR=str(tmp_path / "cache"))
        return done.stdout.strip()

    code = "from moebius.kernels.numba.probe import probe\nprint(probe(3), *probe.compiled.stats.cache_hits.values())"
    assert answer() == "4"
    assert answer() == "4 1"
    callee = tmp_path / "kernels/numba/memory.py"
    edited = callee.read_text().replace("return waited + 1", "return waited + 2")
    assert edited != callee.read_text()
    callee.write_text(edited)
    assert answer() == "5"


def test_unwritable_cache_compiles_in_memory_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a read-only home raises at import, or falls back without a word."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path / "file"))
    jit.cache_folder.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=jit.__name__):
            double = jit.entry("int64(int64)")(lambda x: 2 * x)
            triple = jit.entry("int64(int64)")(lambda x: 3 * x)
            assert (double(4), triple(4)) == (8, 12)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "MOEBIUS_CACHE_DIR" in caplog.text
    finally:
        jit.cache_folder.cache_clear()


def _folders(root: Path, ages_in_days: list[float]) -> None:
    for number, age in enumerate(ages_in_days):
        (root / f"{number:02}" / "entry").mkdir(parents=True)
        (root / f"{number:02}" / "entry" / "code.nbc").write_bytes(b"code")
        os.utime(root / f"{number:02}", times=(time.time() - age * 86400,) * 2)


def test_code_that_nobody_used_for_long_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the folder grows with every edit and every version; or what another process compiles today vanishes."""
    root = tmp_path / "numba"
    _folders(root, [100, 0.5, 3, 0.2, 2, 40, 4, 0.9, 7, 0.1, 0.3, 0.4])
    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path))
    jit.cache_folder.cache_clear()
    try:
        folder = jit.cache_folder()
        assert folder is not None
        left = {path.name for path in root.iterdir()}
        assert left == {folder.name, "01", "03", "07", "09", "10", "11", "04"}  # the newest eight
        for number in range(20, 40):
            (root / str(number)).mkdir()
        jit._prune(root)
        assert len(list(root.iterdir())) == 27  # all of today; 04 is two days old and no longer among the newest
        os.utime(folder, times=(0, 0))
        jit.cache_folder.cache_clear()
        assert jit.cache_folder() == folder  # a hit: nothing is looked at
        assert time.time() - folder.stat().st_mtime < 3600
    finally:
        jit.cache_folder.cache_clear()


def test_several_processes_may_prune_at_once(tmp_path: Path) -> None:
    """Bug: a folder that another process removes meanwhile raises, and the call that only wanted to compile fails."""
    _folders(tmp_path, [30.0 + age for age in range(60)])
    barrier, errors = threading.Barrier(4), []

    def prune() -> None:
        barrier.wait()
        try:
            jit._prune(tmp_path)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=prune) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(list(tmp_path.iterdir())) == jit._KEPT


def test_key_depends_on_every_source_and_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a cache on a shared home holds AVX-512 code that a smaller machine then runs."""
    key = jit.source_key()
    assert key == jit.source_key()
    codegen = type(jit.cpu_target.target_context.codegen())
    monkeypatch.setattr(codegen, "magic_tuple", lambda self: ("another", "cpu", "+sse2"))
    assert jit.source_key() != key


@pytest.mark.parametrize("cause", [KeyboardInterrupt, ValueError])
def test_an_interrupt_stays_an_interrupt(cause: type[BaseException]) -> None:
    """Ctrl-C in the conversion of a result comes out of Numba as a SystemError, which callers take for a crash."""

    def interrupted() -> None:
        try:
            raise cause
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error

    entry = jit.Entry(interrupted, "void()", callback=False)
    entry.__dict__["compiled"] = interrupted
    with pytest.raises(KeyboardInterrupt if cause is KeyboardInterrupt else SystemError):
        entry()
