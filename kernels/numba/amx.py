"""AMX: eight tile registers of sixteen rows of 64 bytes, and products of whole tiles.

``C[m, n] += sum over k of A[m, k] * B[k, n]`` on fp32 C [16, 16] and bf16 A [16, 32] and B [32, 16], where a row of B's
tile holds two consecutive k side by side for each n. Every thread configures its tiles before it uses them, and then
releases them. Instructions as in Intel's Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from moebius.kernels.numba import isa
from moebius.kernels.numba.jit import OPTIONS, helper, intrinsic
from moebius.kernels.numba.memory import poke, reserve

ROWS, LINE = 16, 64  # of a tile: rows, and bytes of each
_overload: Any = numba.extending.overload  # whose type of options is not public
_POINTER, _BYTE, _WORD = ir.IntType(8).as_pointer(), ir.IntType(8), ir.IntType(64)


def available() -> bool:
    """Whether code is compiled for a processor with tiles that the system lets this process use."""
    return isa.has_tiles()


def only_with_tiles(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a callee that is compiled where there are tiles; elsewhere calls of it are False, at no cost.

    It returns whether it has computed what it was asked for.
    """
    compiled = helper(function)

    def stub(*args: Any) -> bool:
        raise NotImplementedError(f"{function.__name__} is called from compiled code only")

    @_overload(stub, jit_options=OPTIONS)
    def choose(*args):  # type: ignore[no-untyped-def]
        if available():
            return lambda *args: compiled(*args)
        return lambda *args: False

    return stub


@helper
def configure():  # type: ignore[no-untyped-def]
    """Give this thread eight tiles of 16 rows of 64 bytes."""
    config = reserve(64)
    for place in range(8):
        poke(config + 8 * place, np.int64(0))
    poke(config, np.uint8(1))  # the only palette there is
    for tile in range(8):
        poke(config + 16 + 2 * tile, np.uint16(LINE))
        poke(config + 48 + tile, np.uint8(ROWS))
    load_config(config)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _numbers(*tiles: Any) -> list[ir.Constant] | None:
    """Constants for literal tile numbers, which are part of the instruction."""
    if not all(isinstance(tile, types.IntegerLiteral) for tile in tiles):
        return None
    return [ir.Constant(_BYTE, tile.literal_value) for tile in tiles]


def _at_memory(name: str, *arguments: Any) -> Any:
    """Signature and code of an instruction on (a tile, an address, bytes from row to row)."""
    numbers = _numbers(arguments[0])
    if numbers is None:
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, name, *numbers, builder.inttoptr(args[1], _POINTER), args[2])
        return context.get_dummy_value()

    return types.void(arguments[0], types.int64, types.int64), codegen


def _on_tiles(name: str, *tiles: Any) -> Any:
    """Signature and code of an instruction on tiles alone."""
    numbers = _numbers(*tiles)
    if numbers is None:
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, name, *numbers)
        return context.get_dummy_value()

    return types.void(*tiles), codegen


@intrinsic
def load_config(typingctx, address):  # type: ignore[no-untyped-def]
    """Take the 64 bytes at `address` as this thread's configuration; all tiles become zero."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, "ldtilecfg", builder.inttoptr(args[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release(typingctx):  # type: ignore[no-untyped-def]
    """Give this thread's tiles up, so that the system need not save them."""
    return _on_tiles("tilerelease")


@intrinsic(prefer_literal=True)
def zero(typingctx, tile):  # type: ignore[no-untyped-def]
    """Fill a tile with zeros."""
    return _on_tiles("tilezero", tile)


@intrinsic(prefer_literal=True)
def load(typingctx, tile, address, pitch):  # type: ignore[no-untyped-def]
    """Read a tile from rows that begin `pitch` bytes apart."""
    return _at_memory("tileloadd64", tile, address, pitch)


@intrinsic(prefer_literal=True)
def store(typingctx, tile, address, pitch):  # type: ignore[no-untyped-def]
    """Write a tile to rows that begin `pitch` bytes apart."""
    return _at_memory("tilestored64", tile, address, pitch)


@intrinsic(prefer_literal=True)
def dot_bf16(typingctx, total, left, right):  # type: ignore[no-untyped-def]
    """Add products of bf16 to fp32; subnormals count as zero."""
    return _on_tiles("tdpbf16ps", total, left, right)
