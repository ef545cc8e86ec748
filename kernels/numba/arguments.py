"""The one place that checks what enters compiled code; the kernels behind it assume everything.

A layer becomes words once (`describe`); a call becomes a job (`prepare`), which any number of threads then work on by
calling the layer's compiled function with the job's address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moebius.kernels.experts import ExpertSpec, Part, RecordLayout
from moebius.kernels.numba import coded, portable, quantized, words, work
from moebius.kernels.numba.bfloats import multiplies_pairs
from moebius.kernels.numba.decoding import SCALE_KINDS
from moebius.kernels.numba.groups import vector_bytes
from moebius.kernels.numba.jit import Entry
from moebius.kernels.numba.jobs import BAD_EXPERT, BAD_OFFSETS, BAD_TOKEN, fill, find_range_error
from moebius.kernels.numba.panels import packed_bytes
from moebius.kernels.numba.simd import LANES
from moebius.kernels.routes import Routes

_FLOAT_WORK = {"fp32": work.work_fp32, "bf16": work.work_bf16, "fp16": work.work_fp16}
_ROUNDING_WORK = {"int8": work.work_rounding_int8, "int4": work.work_rounding_int4}  # by code
_CODED_WORK = {"int8": work.work_int8, "int4": work.work_int4, "e4m3": work.work_e4m3, "e2m1": work.work_e2m1}
_X_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BF16 = _X_KIND[torch.bfloat16]
_PARTS = {
    "gate": words.GATE, "up": words.UP, "down": words.DOWN,
    "gate_bias": words.GATE_BIAS, "up_bias": words.UP_BIAS, "down_bias": words.DOWN_BIAS,
    "gate_scale": words.GATE_SCALE, "up_scale": words.UP_SCALE, "down_scale": words.DOWN_SCALE,
    "gate_zero": words.GATE_ZERO, "up_zero": words.UP_ZERO, "down_zero": words.DOWN_ZERO,
}  # fmt: skip
Parts = Mapping[str, Sequence[torch.Tensor] | torch.Tensor]
_ROUTES = np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's experts as kernels see them; keeps their `parts` alive.

    Args:
        words: int64 [LAYER_WORDS], see `words`.
        addresses: the table of addresses, int64 [E, words.PARTS].
        num_experts: E.
        rounds: whether inputs are rounded to integers before the kernels for few pairs read them.
        pairs: whether panels beside inputs in bf16 are multiplied in bf16: weights are no finer, the processor can.
        few: pairs up to which an expert is not computed in panels.
        x_bytes: bytes of a token's input as the kernels for few pairs read it.
        pair_bytes: bytes of a pair's intermediate, in whichever form, and of its packed input; beside panels in fp32,
            and beside those in bf16.
        work: computes units of a job in the layer's format.
    """

    words: np.ndarray
    addresses: np.ndarray
    hidden: int
    num_experts: int
    rounds: bool
    pairs: bool
    few: int
    x_bytes: int
    pair_bytes: tuple[tuple[int, int], tuple[int, int]]
    work: Entry
    parts: Parts


def describe(spec: ExpertSpec, layout: RecordLayout, parts: Parts) -> Layer:
    """Describe the experts of one layer to the kernels.

    Args:
        parts: by the names of `layout.parts()`, each expert's tensor, contiguous, in host memory, at any address.

    Raises:
        ValueError: an activation that has no kernel, or tensors of another kind.
    """
    if spec.torch_code:
        raise ValueError("custom activations and norms of expert outputs have no CPU kernel; they are torch code")
    if layout != RecordLayout.of(spec, layout.format):
        raise ValueError(f"the record layout {layout} does not belong to experts of {spec}")
    addresses = _addresses(layout, parts)
    x_bytes, inner_bytes = (_vector_bytes(n, layout) for n in (spec.hidden, spec.intermediate))
    fp32, bf16 = (
        (max(inner_bytes, packed_bytes(spec.intermediate, size)), packed_bytes(spec.hidden, size)) for size in (4, 2)
    )
    described = _layer_words(spec, layout, addresses)
    few = quantized.FEW.get(layout.format, coded.FEW if layout.quantized else portable.FEW)
    return Layer(
        described, addresses, spec.hidden, len(addresses), _rounds(layout), _pairs(layout), few, x_bytes, (fp32, bf16),
        _work(layout), parts,
    )  # fmt: skip


def _vector_bytes(n: int, layout: RecordLayout) -> int:
    floats = -(-n // LANES) * LANES * 4
    if layout.format == "mxfp4":  # beside inputs in fp32 and in 16 bits
        return max(floats, vector_bytes(n, "mxfp4"))
    return vector_bytes(n, layout.format) if _rounds(layout) else floats


def _rounds(layout: RecordLayout) -> bool:
    return layout.coding is not None and layout.coding.rounds


def _pairs(layout: RecordLayout) -> bool:
    return layout.format not in ("fp32", "fp16") and multiplies_pairs()  # asks LLVM, for 0.1 ms: once for a layer


def _work(layout: RecordLayout) -> Entry:
    coding = layout.coding
    if coding is None:
        return _FLOAT_WORK[layout.format]
    if layout.format == "mxfp4":
        return work.work_mxfp4
    return (_ROUNDING_WORK if coding.rounds else _CODED_WORK)[coding.code]


def _addresses(layout: RecordLayout, parts: Parts) -> np.ndarray:
    known = layout.parts()
    if parts.keys() != known.keys() or len({len(tensors) for tensors in parts.values()}) != 1:
        raise ValueError(f"experts in {layout.format} have {', '.join(known)}, as many of each, not {', '.join(parts)}")
    result = np.zeros((len(parts["up"]), words.PARTS), np.int64)
    for name, part in known.items():
        result[:, _PARTS[name] - words.GATE] = _places(name, part, parts[name])
    return result


def _places(name: str, part: Part, tensors: Sequence[torch.Tensor] | torch.Tensor) -> np.ndarray | list[int]:
    for tensor in tensors[:1] if isinstance(tensors, torch.Tensor) else tensors:  # stacked ones are all alike
        if (tensor.shape, tensor.dtype) != (part.shape, part.dtype) or not (tensor.is_cpu and tensor.is_contiguous()):
            raise ValueError(
                f"{name} of an expert must be {part.dtype} {list(part.shape)}, contiguous in host memory, not "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if isinstance(tensors, torch.Tensor):
        return tensors.data_ptr() + tensors.stride(0) * tensors.itemsize * np.arange(len(tensors))
    return [tensor.data_ptr() for tensor in tensors]


def _layer_words(spec: ExpertSpec, layout: RecordLayout, addresses: np.ndarray) -> np.ndarray:
    result = np.zeros(words.LAYER_WORDS, np.int64)
    kind, *limits = spec.activation
    result[[words.HIDDEN, words.INTERMEDIATE, words.KIND]] = spec.hidden, spec.intermediate, kind
    result.view(np.float32)[2 * words.ALPHA : 2 * words.UP_SHIFT + 2 : 2] = limits
    for name in layout.parts():
        result[_PARTS[name]] = addresses.ctypes.data + words.WORD * (_PARTS[name] - words.GATE)
    if (coding := layout.coding) is not None:
        result[[words.SCALE_KIND, words.SCALE_ROWS, words.SCALE_COLUMNS]] = (
            SCALE_KINDS[coding.scale], coding.rows, coding.columns,
        )  # fmt: skip
    return result


def new_job() -> np.ndarray:
    """Words of a job, with the counters on cache lines of their own; one may serve any number of calls in turn."""
    words_and_slack = np.zeros(words.JOB_WORDS + 8, np.int64)
    return words_and_slack[(-words_and_slack.ctypes.data // 8) % 8 :][: words.JOB_WORDS]


def prepare(
    job: np.ndarray,
    layer: Layer,
    x: torch.Tensor,
    routes: Routes,
    out: torch.Tensor,
    reserve: Callable[[int], np.ndarray],
) -> np.ndarray:
    """Make `job` the one that adds the routed experts' weighted outputs for x to `out`.

    Whoever works on the job keeps all arguments and the result alive.

    Args:
        job: from `new_job`; nobody may be working on it.
        x: fp32, bf16 or fp16 [T, H], contiguous, in host memory.
        out: fp32 [T, H], contiguous, in host memory.
        reserve: gives scratch memory for the job, uint8 [n] for n bytes or longer, best at a multiple of 64 bytes.

    Returns:
        The scratch memory.

    Raises:
        ValueError, TypeError: arguments of another shape, type or place, or routes out of range.
    """
    _check_tensors(layer.hidden, x, out)
    tokens, kind = x.shape[0], _X_KIND[x.dtype]
    paired = layer.pairs and kind == _BF16  # whether panels are multiplied in bf16
    prepares = tokens if layer.rounds or kind else 0  # whose input the kernels for few pairs cannot read as it is
    x_bytes = layer.x_bytes if prepares else 4 * layer.hidden
    inner_bytes, packed = layer.pair_bytes[paired]
    slots = (len(routes.tokens) + (LANES - 1) * len(routes.experts)) // LANES * LANES  # see `units.slot_of`
    scratch = reserve(slots * (inner_bytes + packed) + prepares * x_bytes)
    try:
        status = fill(job, layer.words, layer.num_experts, x.data_ptr(), kind, tokens, layer.few, prepares, paired,
                      out.data_ptr(), *routes, scratch, x_bytes, inner_bytes, packed)  # fmt: skip
    except TypeError:
        _check_form(routes)
        raise
    if status:
        raise ValueError(_explain(status, layer.num_experts, tokens, routes))
    return scratch


def check(hidden: int, num_experts: int, x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
    """Raise what `prepare` would, for a call that other code than the kernels computes."""
    _check_tensors(hidden, x, out)
    _check_form(routes)
    status = find_range_error(num_experts, x.shape[0], *routes)
    if status:
        raise ValueError(_explain(status, num_experts, x.shape[0], routes))


def _check_form(routes: Routes) -> None:
    for array, dtype in zip(routes, _ROUTES, strict=True):
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise TypeError(f"routes must be contiguous vectors of {_ROUTES}, not {array.dtype} {array.shape}")


def _check_tensors(hidden: int, x: torch.Tensor, out: torch.Tensor) -> None:
    if x.dtype not in _X_KIND or out.dtype != torch.float32:
        raise TypeError(f"x must be fp32, bf16 or fp16 and out fp32, not {x.dtype} and {out.dtype}")
    if x.ndim != 2 or x.shape[1] != hidden or out.shape != x.shape:
        raise ValueError(f"x and out must be [T, {hidden}], not {list(x.shape)} and {list(out.shape)}")
    for name, tensor in (("x", x), ("out", out)):
        if not (tensor.is_cpu and tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous in host memory; it is on {tensor.device}, {tensor.stride()}")


def _explain(status: int, num_experts: int, tokens: int, routes: Routes) -> str:
    if status == BAD_EXPERT:
        return f"routes name experts {routes.experts.min()}..{routes.experts.max()}, but 0..{num_experts - 1} exist"
    if status == BAD_TOKEN:
        return f"routes name tokens {routes.tokens.min()}..{routes.tokens.max()}, but 0..{tokens - 1} exist"
    assert status == BAD_OFFSETS
    return (
        f"routes.offsets must rise from 0 to {len(routes.tokens)}, the number of pairs, in {len(routes.experts) + 1} "
        f"entries, and weights must be as many as tokens ({len(routes.weights)} found)"
    )
