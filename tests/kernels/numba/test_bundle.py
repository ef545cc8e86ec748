"""Arrays as one argument: what compiled code opens is what was put in."""

from __future__ import annotations

import numpy as np
import pytest

from moebius.kernels.numba.bundle import BUNDLE, bundle, open1, open2, open3, open4
from moebius.kernels.numba.jit import entry


@entry(f"float64({BUNDLE})")
def _touch(words):  # type: ignore[no-untyped-def]
    first, second = open1(words, 0, np.int64(0)), open2(words, 1, np.float32(0))
    third, fourth = open3(words, 2, np.bool_(False)), open4(words, 3, 0.0)
    fourth[-1, -1, -1, -1] = 7.0
    return first[-1] + second[1, 2] + third[1, 0, 2] + third[0, 1, 1] + third.size


def test_opened_arrays_are_the_bundled_ones() -> None:
    """Catches dimensions in the wrong order, strides of another type, and copies."""
    third = np.zeros((2, 2, 3), np.bool_)
    third[1, 0, 2] = True
    arrays = np.arange(5), np.arange(6, dtype=np.float32).reshape(2, 3), third, np.zeros((2, 1, 3, 2))
    words = bundle(arrays, ((np.int64, 1), (np.float32, 2), (np.bool_, 3), (np.float64, 4)))
    assert _touch(words) == 4 + 5 + 1 + 0 + 12
    assert arrays[3][1, 0, 2, 1] == 7
    assert arrays[3].sum() == 7


@pytest.mark.parametrize("array", [np.zeros(3, np.int32), np.zeros((3, 1)), np.zeros(6)[::2]])
def test_another_kind_is_refused(array: np.ndarray) -> None:
    """Catches memory read as another type, or beyond its end."""
    with pytest.raises(TypeError, match="contiguous, float64 and have 1 dimensions"):
        bundle([array], [(np.float64, 1)])
