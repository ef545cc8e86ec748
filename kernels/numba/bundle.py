"""Many arrays as one argument of compiled code: Numba takes 0.1 us of every call for each array it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import carray, types

from moebius.kernels.numba.jit import helper, intrinsic

_WORDS = 5  # address and up to four dimensions
BUNDLE = "int64[:, ::1]"  # its type, for signatures


def bundle(arrays: Sequence[np.ndarray], kinds: Sequence[tuple[type, int]]) -> np.ndarray:
    """Where `arrays` are and their shapes, int64 [n, 5]; they must neither move nor end before it.

    Args:
        kinds: dtype and number of dimensions of each, as compiled code opens them.

    Raises:
        TypeError: an array is of another kind, or not contiguous.
    """
    words = np.zeros((len(arrays), _WORDS), np.int64)
    for i, (array, (dtype, dimensions)) in enumerate(zip(arrays, kinds, strict=True)):
        if array.dtype != dtype or array.ndim != dimensions or not array.flags.c_contiguous:
            raise TypeError(
                f"array {i} is {array.dtype} {list(array.shape)}; it must be contiguous, {np.dtype(dtype)} and have "
                f"{dimensions} dimensions"
            )
        words[i, 0], words[i, 1 : 1 + dimensions] = array.ctypes.data, array.shape
    return words


@intrinsic
def _pointer(typingctx, address, witness):  # type: ignore[no-untyped-def]
    """`address` as a pointer to values of the type of `witness`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointed: ir.Type = context.get_data_type(witness)
        return builder.inttoptr(args[0], pointed.as_pointer())

    return types.CPointer(witness)(types.int64, witness), codegen


@helper
def open1(words, i, witness):  # type: ignore[no-untyped-def]
    """Array `i` of a bundle, of one dimension; `witness` is any value of its type."""
    return carray(_pointer(words[i, 0], witness), (words[i, 1],))


@helper
def open2(words, i, witness):  # type: ignore[no-untyped-def]
    """Array `i` of a bundle, of two dimensions."""
    return carray(_pointer(words[i, 0], witness), (words[i, 1], words[i, 2]))


@helper
def open3(words, i, witness):  # type: ignore[no-untyped-def]
    """Array `i` of a bundle, of three dimensions."""
    return carray(_pointer(words[i, 0], witness), (words[i, 1], words[i, 2], words[i, 3]))


@helper
def open4(words, i, witness):  # type: ignore[no-untyped-def]
    """Array `i` of a bundle, of four dimensions."""
    return carray(_pointer(words[i, 0], witness), (words[i, 1], words[i, 2], words[i, 3], words[i, 4]))
