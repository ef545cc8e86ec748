"""Dense layers for a few rows, at the speed of memory.

Decoding reads each dense weight once too, and torch reads it slower than memory can: of a Zen 5's 42 GB/s (two cores,
a matrix of 32000 x 2048) 28 for one row in bf16, 21 in fp32, and for eight rows 12 in fp32 and 6 in fp16, where this
gets 40 and 42, 32 and 26.
"""

from __future__ import annotations

import numpy as np
import torch

from moebius.cpu_experts import team
from moebius.kernels.numba import linear as kernels
from moebius.kernels.numba.isa import has_feature
from moebius.kernels.numba.jit import Entry

# Fewest and most rows for which this was faster than torch. Vectors in bf16 are widened to fp32: more than `_VECTORS`
# numbers have no room in a first-level cache, which bf16 alone is fast enough to notice.
_KERNELS: dict[torch.dtype, tuple[Entry, int, int]] = {
    torch.float32: (kernels.linear_fp32, 1, 16),
    torch.bfloat16: (kernels.linear_bf16, 1, 4),
    torch.float16: (kernels.linear_fp16, 2, 16),
}
_VECTORS = 8192

# Below this torch's own call is as fast: the weights stay in a cache, and the time is that of the call.
_LEAST_BYTES = 1 << 20


def worthwhile(weight: torch.Tensor) -> bool:
    """Whether `multiply` is worth its call for some numbers of rows with a weight in host memory [N, n]."""
    return weight.dtype in _KERNELS and weight.nbytes >= _LEAST_BYTES and has_feature("avx2") and team.exists()


def is_faster(rows: int, weight: torch.Tensor) -> bool:
    """Whether `multiply` is faster than torch for x [rows, n] and a `worthwhile` weight [N, n]."""
    if weight.dtype not in _KERNELS:  # the model's dtype was changed since
        return False
    _, fewest, most = _KERNELS[weight.dtype]
    if weight.dtype == torch.bfloat16:
        most = max(1, min(most, _VECTORS // weight.shape[1]))
    return fewest <= rows <= most


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x weight^T + bias, summed in fp32 and rounded once, on torch's threads.

    Args:
        x: fp32, bf16 or fp16 [..., n], in host memory.
        weight: of the same dtype, contiguous [N, n].
        bias: of the same dtype [N].

    Returns:
        [..., N] in the same dtype; None where torch's threads cannot be had, as in a forked child with more than one.
    """
    rows, n = weight.shape
    vectors = x.reshape(-1, n).float().contiguous()
    out = torch.empty(vectors.shape[0], rows, dtype=torch.float32, device="cpu")
    job = np.zeros(kernels.WORDS, np.int64)
    job[kernels.MATRIX :] = weight.data_ptr(), vectors.data_ptr(), out.data_ptr(), rows, n, vectors.shape[0]
    entry, _, _ = _KERNELS[weight.dtype]
    if not team.run(entry.address, job.ctypes.data, torch.get_num_threads() - 1):
        return None
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], rows)
