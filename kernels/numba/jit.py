"""How this package compiles: `helper` and `inner` for callees, `entry` for calls from outside, `intrinsic` for LLVM.

Decorating costs nothing and touches no disk. An entry is compiled, or loaded from disk, at its first use. Numba's own
cache notices an edit of the cached function's file only, so the folder is keyed by a hash of *all* kernel sources, of
the versions and of the instruction set; each entry has its own folder below it, since Numba's index of several
signatures is not safe against two processes that write at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numba.extending
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from moebius.kernels.numba import isa

logger = logging.getLogger(__name__)

# Contraction into fma and no signed zeros, but never "no NaN" or "no infinity": those must behave as in torch. Sums
# are not reassociated either: the order of a sum is written in the kernels and is the same on every thread.
FASTMATH = {"contract", "nsz"}
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}

# Folders of compiled code that are kept, some megabytes each, however long nobody used them; and seconds in which a
# folder counts as used, so that processes of several versions can compile at once.
_KEPT, _RECENT_S = 8, 24 * 3600
_REMOVED = "removed-"

isa.take_choice()  # before the first decorator: it fixes the processor that Numba compiles for
_compiling = threading.RLock()
_config: Any = numba.core.config

intrinsic: Any = numba.extending.intrinsic  # Numba passes the typing context, which type checkers do not know
helper: Any = numba.njit(**OPTIONS)  # without a signature: compiled as a part of the entries that call it


def helper_of(kind: str) -> Callable[[Callable[..., Any]], Any]:
    """`helper` for a function inside of another, which makes one for each `kind`.

    All entries that a process loads share their callees by name, number and types, and processes that compiled them may
    have numbered otherwise: of two callees with one name, one entry would call the other's, with wrong results.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__qualname__ = f"{function.__qualname__}_{kind}"
        return helper(function)

    return decorate


inner: Any = numba.njit(forceinline=True, **OPTIONS)  # in its caller, so that vectors stay in registers


class Entry:
    """One function with one signature, compiled at first use.

    Args:
        function: the Python function.
        signature: Numba signature, such as ``"void(int64)"``.
        callback: compile to a C function whose `address` other kernels can call, instead of a Python callable.
    """

    def __init__(self, function: Callable[..., Any], signature: str, callback: bool) -> None:
        self.function, self.signature, self.callback = function, signature, callback

    @cached_property
    def compiled(self) -> Any:
        with _compiling:
            return self.__dict__.get("compiled") or self._compile()

    def _compile(self) -> Any:
        isa.check_choice()
        folder, previous = cache_folder(), _config.CACHE_DIR
        if folder is not None:
            _config.CACHE_DIR = str(folder / f"{self.function.__module__}.{self.function.__qualname__}")
        try:
            if self.callback:
                options = {key: value for key, value in OPTIONS.items() if key != "nogil"}
                return numba.cfunc(self.signature, cache=folder is not None, **options)(self.function)
            return numba.njit(self.signature, cache=folder is not None, **OPTIONS)(self.function)
        finally:
            _config.CACHE_DIR = previous

    @cached_property
    def address(self) -> int:
        """Address of the compiled C function; only of callbacks."""
        return int(self.compiled.address)

    def __call__(self, *args: Any) -> Any:
        try:
            return self.compiled(*args)
        except SystemError as error:
            if _interrupted(error):  # Ctrl-C fell into Numba's conversion of the result
                raise KeyboardInterrupt from error
            raise


def _interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def entry(signature: str, *, callback: bool = False) -> Callable[[Callable[..., Any]], Entry]:
    """Decorate a function that is called from Python (or, as a `callback`, by its address from other kernels)."""
    return lambda function: Entry(function, signature, callback)


def _begin_fork() -> None:
    """A fork waits for what is being compiled: the child would have the locks of threads that it does not have."""
    _compiling.acquire()
    global_compiler_lock.acquire()


def _end_fork() -> None:
    global_compiler_lock.release()
    _compiling.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork, after_in_child=_end_fork)


def source_key() -> str:
    """Hash of everything that compiled code depends on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    codegen = cpu_target.target_context.codegen()
    facts = (platform.python_version(), platform.system(), numba.__version__, llvmlite.__version__, isa.has_tiles())
    digest.update(repr((facts, codegen.magic_tuple())).encode())
    return digest.hexdigest()[:20]


@cache
def cache_folder() -> Path | None:
    """Where compiled code is kept, or None where no folder is writable: then every process compiles in memory."""
    folder = cache_root() / "numba" / source_key()
    missed = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)  # the time of its last use
    except OSError as error:
        logger.warning(
            "compiled CPU kernels cannot be kept in %s (%s): every process compiles them again, which takes some "
            "seconds; set MOEBIUS_CACHE_DIR to a writable folder", folder, error
        )  # fmt: skip
        return None
    if missed:
        _prune(folder.parent)
    return folder


def _prune(root: Path) -> None:
    """Remove compiled code of other sources, versions and processors, except the newest and what was used today.

    Several processes may do so at once, and the code's owner may be at work: it compiles again what it then misses.
    """
    folders = [folder for folder in root.iterdir() if not folder.name.startswith(_REMOVED)]
    for folder in sorted(folders, key=_last_use, reverse=True)[_KEPT:]:
        if time.time() - _last_use(folder) > _RECENT_S:
            try:  # removing what is in it would make it look just used
                folder.rename(root / f"{_REMOVED}{folder.name}")
            except OSError as error:
                _report(None, str(folder), (None, error))
    for folder in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(folder, onerror=_report)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0


def _report(_function: object, path: str, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        logger.warning("old compiled CPU kernels in %s could not be removed (%s)", path, error[1])


def cache_root() -> Path:
    """The folder of all that Moebius keeps for later processes: MOEBIUS_CACHE_DIR, or the user's cache."""
    chosen = os.environ.get("MOEBIUS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebius"
