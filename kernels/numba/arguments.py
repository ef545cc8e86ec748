"""The one place that checks what enters compiled code; the kernels behind it assume everything.

A layer becomes words once (`describe`); a call becomes a job (`prepare`), which any number of threads then work on by
calling the layer's compiled function with the job's address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moebius.kernels.experts import Act, ExpertSpec, RecordLayout
from moebius.kernels.numba import portable, words
from moebius.kernels.numba.jit import Entry
from moebius.kernels.numba.jobs import BAD_EXPERT, BAD_OFFSETS, BAD_TOKEN, fill
from moebius.kernels.routes import Routes

_WORK: dict[str, Entry] = {"fp32": portable.work_fp32, "bf16": portable.work_bf16, "fp16": portable.work_fp16}
_X_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PARTS = {
    "gate": words.GATE, "up": words.UP, "down": words.DOWN,
    "gate_bias": words.GATE_BIAS, "up_bias": words.UP_BIAS, "down_bias": words.DOWN_BIAS,
}  # fmt: skip
_ROUTES = (("experts", np.int32), ("offsets", np.int32), ("tokens", np.int32), ("weights", np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's experts as kernels see them; keeps `records` alive.

    Args:
        words: int64 [LAYER_WORDS], see `words`.
        num_experts: E.
        work: computes units of a job in the layer's format.
    """

    words: np.ndarray
    num_experts: int
    work: Entry
    records: torch.Tensor


def describe(spec: ExpertSpec, layout: RecordLayout, records: torch.Tensor) -> Layer:
    """Describe the experts of one layer to the kernels.

    Args:
        records: uint8 [E, layout.nbytes], contiguous, in host memory.

    Raises:
        ValueError: a format or an activation that has no kernel, or records of another shape.
    """
    if layout.format not in _WORK:
        raise ValueError(f"there is no CPU kernel for the expert format {layout.format!r}, only for {', '.join(_WORK)}")
    if spec.activation.kind == Act.CUSTOM or spec.custom is not None or spec.post_norm is not None:
        raise ValueError("custom activations and norms of expert outputs have no CPU kernel; they are torch code")
    if layout != RecordLayout.of(spec, layout.format):
        raise ValueError(f"the record layout {layout} does not belong to experts of {spec}")
    if records.dtype != torch.uint8 or records.ndim != 2 or records.shape[1] != layout.nbytes:
        raise ValueError(f"records must be uint8 [E, {layout.nbytes}], not {records.dtype} {list(records.shape)}")
    if records.device.type != "cpu" or not records.is_contiguous():
        raise ValueError(f"records must be contiguous in host memory, not on {records.device}")
    return Layer(_layer_words(spec, layout, records), records.shape[0], _WORK[layout.format], records)


def _layer_words(spec: ExpertSpec, layout: RecordLayout, records: torch.Tensor) -> np.ndarray:
    result = np.zeros(words.LAYER_WORDS, np.int64)
    kind, *limits = spec.activation
    result[[words.HIDDEN, words.INTERMEDIATE, words.KIND]] = spec.hidden, spec.intermediate, kind
    result.view(np.float32)[2 * words.ALPHA : 2 * words.UP_SHIFT + 2 : 2] = limits
    for name, offset in layout.offsets().items():
        result[_PARTS[name]] = records.data_ptr() + offset * layout.dtype.itemsize
        result[_PARTS[name] + 1] = layout.nbytes
    return result


def prepare(
    layer: Layer, x: torch.Tensor, routes: Routes, out: torch.Tensor, allocate: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Make the job that adds the routed experts' weighted outputs for x to `out`.

    Args:
        x: fp32, bf16 or fp16 [T, H], contiguous, in host memory.
        out: fp32 [T, H], contiguous, in host memory.
        allocate: gives a float32 array of at least so many elements.

    Returns:
        The job's words (int64 [JOB_WORDS]) and its scratch memory. Whoever works on the job keeps both and the
        arguments alive.

    Raises:
        ValueError, TypeError: arguments of another shape, type or place, or routes out of range.
    """
    _check_tensors(layer, x, out)
    for name, dtype in _ROUTES:
        array = getattr(routes, name)
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise TypeError(f"routes.{name} must be contiguous {dtype.__name__} [.], not {array.dtype} {array.shape}")
    tokens = x.shape[0]
    stride = -(-int(layer.words[words.INTERMEDIATE]) // 16) * 16
    pairs = len(routes.tokens)
    scratch = allocate(pairs * stride + (0 if x.dtype == torch.float32 else x.numel()))
    job = np.zeros(words.JOB_WORDS + 8, np.int64)
    job = job[(-job.ctypes.data // 8) % 8 :][: words.JOB_WORDS]  # counters on cache lines of their own
    status = fill(job, layer.words, layer.num_experts, x.data_ptr(), _X_KIND[x.dtype], tokens, out.data_ptr(),
                  routes.experts, routes.offsets, routes.tokens, routes.weights, scratch, stride)  # fmt: skip
    if status:
        raise ValueError(_explain(status, layer, tokens, routes))
    return job, scratch


def _check_tensors(layer: Layer, x: torch.Tensor, out: torch.Tensor) -> None:
    hidden = int(layer.words[words.HIDDEN])
    if x.dtype not in _X_KIND or out.dtype != torch.float32:
        raise TypeError(f"x must be fp32, bf16 or fp16 and out fp32, not {x.dtype} and {out.dtype}")
    if x.ndim != 2 or x.shape[1] != hidden or out.shape != x.shape:
        raise ValueError(f"x and out must be [T, {hidden}], not {list(x.shape)} and {list(out.shape)}")
    for name, tensor in (("x", x), ("out", out)):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous in host memory; it is on {tensor.device}, {tensor.stride()}")


def _explain(status: int, layer: Layer, tokens: int, routes: Routes) -> str:
    if status == BAD_EXPERT:
        return (
            f"routes name experts {routes.experts.min()}..{routes.experts.max()}, but 0..{layer.num_experts - 1} exist"
        )
    if status == BAD_TOKEN:
        return f"routes name tokens {routes.tokens.min()}..{routes.tokens.max()}, but 0..{tokens - 1} exist"
    assert status == BAD_OFFSETS
    return (
        f"routes.offsets must rise from 0 to {len(routes.tokens)}, the number of pairs, in {len(routes.experts) + 1} "
        f"entries, and weights must be as many as tokens ({len(routes.weights)} found)"
    )
