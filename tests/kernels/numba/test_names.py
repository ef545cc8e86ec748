"""Callees that different processes compiled meet in one process, where they are told apart by their names."""

from __future__ import annotations

import pkgutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from numba.core.registry import CPUDispatcher

import moebius.kernels.numba as package

_ROOT = Path(__file__).parents[3]

_MODULE = """
from moebius.kernels.numba.jit import entry, helper_of

def make(kind):
    @helper_of(str(kind))
    def value(n):
        total = 0
        for i in range(n):
            total = total * 31 + kind
            for j in range(i):
                total ^= total >> 7
                for k in range(j):
                    total += (total << 3) % 1000003
        return total
    return value

first, second = make(1), make(2)

@entry("int64(int64)")
def one(n):
    return first(n) + first(n + 1) + first(n + 2)

@entry("int64(int64)")
def two(n):
    return second(n) + second(n + 1) + second(n + 2)
"""


def _functions(value: Any, seen: dict[int, CPUDispatcher]) -> None:
    """All callees that a value of a module leads to, by identity."""
    if isinstance(value, tuple):
        for one in value:
            _functions(one, seen)
    elif isinstance(value, CPUDispatcher) and id(value) not in seen:
        seen[id(value)] = value
        for cell in value.py_func.__closure__ or ():
            _functions(cell.cell_contents, seen)


def _callees() -> Iterator[CPUDispatcher]:
    seen = dict[int, CPUDispatcher]()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for value in vars(import_module(module.name)).values():
            _functions(value, seen)
    yield from seen.values()


def test_no_two_callees_have_one_name() -> None:
    """Bug: a factory's functions share a name, and a tile of sixteen vectors computes with the code of another."""
    names = [(callee.py_func.__module__, callee.py_func.__qualname__) for callee in _callees()]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))


def test_entries_of_different_processes_keep_their_callees(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Bug: the callee that is run depends on what was compiled when, and by whom: with `helper`, every other time."""
    (tmp_path / "twice.py").write_text(_MODULE)

    def run(code: str) -> list[str]:
        done = run_python(code, cwd=tmp_path, path=(tmp_path, _ROOT), MOEBIUS_CACHE_DIR=str(tmp_path / "cache"))
        return done.stdout.split()

    alone = [*run("import twice; print(twice.one(5))"), *run("import twice; print(twice.two(5))")]
    assert run("import twice; print(twice.one(5), twice.two(5))") == alone
