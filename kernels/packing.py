"""Weights, or the codes of a quantised checkpoint, into records and back; quantisation begins here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

import torch
import torch.nn.functional as F

from moebius.kernels.encoding import decode, encode, from_bytes, to_bytes
from moebius.kernels.experts import ExpertWeights, RecordLayout
from moebius.kernels.formats import FLOATS, GROUP, Coding
from moebius.kernels.numba import matrices
from moebius.kernels.numba.quantizer import quantize_into

_HALF = GROUP // 2
_STRIP = 32  # rows or columns that are copied at a time where matrices are interleaved
_RANGES = {8: (-127, 127), 4: (-8, 7)}  # of codes
# Multiples of the scale that maps a group's largest weight to the end of the range, from where the search begins
_STARTS = {8: (1.0,), 4: (1.0, 0.88, 0.77)}
_REFINEMENTS = 2  # rounds of codes for the scale, then the best scale for the codes


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrix:
    """A matrix [n, m] of a quantised checkpoint.

    Args:
        columns: m.
        codes: uint8 [n, bytes], as records have them; see `encoding.to_bytes`.
        scales, zeros: [*coding.blocks((n, m))], in the types of `moebius.kernels.formats`.
        order: where columns are not grouped in their order, the block of each, int64 [m].
        paired: whether 4-bit codes are [n, m / 2] yet, neighbours in one byte, the first of them in its low bits.
    """

    coding: Coding
    columns: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None
    paired: bool = False

    def numbers(self) -> torch.Tensor:
        """The weights, fp32 [n, m]."""
        stored = self.codes
        if self.paired:
            rows, nbytes = len(stored), -(-self.columns // GROUP) * _HALF
            stored = _part_pairs(stored, torch.empty(rows, nbytes, dtype=torch.uint8, device=stored.device))
        if self.order is None:
            return unpack_matrix(self.coding, self.columns, stored, self.scales, self.zeros)
        codes, ungrouped = from_bytes(stored, self.columns, self.coding.bits), replace(self.coding, columns=GROUP)
        matrix = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for block in range(self.scales.shape[1]):
            mine = self.order == block
            zeros = None if self.zeros is None else self.zeros[:, block, None]
            matrix[:, mine] = decode(ungrouped, codes[:, mine], self.scales[:, block, None], zeros)
        return matrix

    def rows(self, which: slice) -> CodedMatrix:
        """Some rows of a matrix whose rows have scales of their own."""
        assert self.coding.rows == 1, self.coding
        zeros = None if self.zeros is None else self.zeros[which]
        return replace(self, codes=self.codes[which], scales=self.scales[which], zeros=zeros)


def _part_pairs(pairs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Bring `paired` codes into the order of records, into `target` uint8 [n, 16 g], which is returned."""
    if padding := target.shape[-1] - pairs.shape[-1]:
        pairs = F.pad(pairs, (0, padding))
    if target.device.type == "cpu":
        matrices.part_pairs(pairs, target)
        return target
    return target.copy_(to_bytes(torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2), 4))


def has_nan(coding: Coding, codes: torch.Tensor) -> bool:
    """Whether a code (uint8, of any shape) stands for NaN."""
    if coding.code != "e4m3":
        return False
    return matrices.has_nan(codes) if codes.device.type == "cpu" else bool(((codes & 127) == 127).any())


def pack(layout: RecordLayout, records: torch.Tensor, weights: Mapping[str, torch.Tensor | CodedMatrix]) -> None:
    """Write weights into records, converting or quantising them.

    Args:
        records: uint8 [..., layout.nbytes].
        weights: some or all of the layout's weights by name, [..., *shape], of any floating dtype. What is coded as the
            layout has it is copied as it is.
    """
    stored, coding = layout.stored(records), layout.coding
    for name, matrix in weights.items():
        if isinstance(matrix, CodedMatrix):
            if matrix.coding == coding and matrix.order is None:
                if matrix.paired:
                    _part_pairs(matrix.codes, stored[name])
                else:
                    stored[name].copy_(matrix.codes)
                _put_scales(name, stored, matrix.scales, matrix.zeros)
                continue
            weight = matrix.numbers()
        else:
            weight = matrix
        if coding is None or f"{name}_scale" not in stored:
            copy(stored[name], weight)
        elif coding.rounds:
            _quantize_to(weight, coding.bits, stored[name], stored[f"{name}_scale"])
        else:
            _encode_to(weight, coding, name, stored)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what may lie transposed or interleaved on either side, in the order in which caches help.

    One of two interleaved bf16 [4096, 1024] is read in 5 ms so, and in 16 by torch alone; written of fp32 in 4 and 22.
    """
    if _interleaved(source):
        for into, strip in zip(target.split(_STRIP, -1), source.split(_STRIP, -1), strict=True):
            into.copy_(strip)
    elif target.is_contiguous():
        target.copy_(source)
    else:
        source = source.to(target.dtype)  # torch transposes quickly within a dtype only
        strips = _STRIP if _interleaved(target) else max(1, target.shape[0])
        for into, strip in zip(target.split(strips), source.split(strips), strict=True):
            into.copy_(strip)


def _interleaved(matrix: torch.Tensor) -> bool:
    return matrix.ndim > 1 and min(matrix.stride()[-2:]) > 1


def _put_scales(name: str, stored: dict[str, torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    stored[f"{name}_scale"].copy_(scales)
    if zeros is not None:
        stored[f"{name}_zero"].copy_(zeros)


def _encode_to(weight: torch.Tensor, coding: Coding, name: str, stored: dict[str, torch.Tensor]) -> None:
    if weight.ndim > 2:
        for index in range(len(weight)):
            _encode_to(weight[index], coding, name, {key: part[index] for key, part in stored.items()})
        return
    codes, scales, zeros = encode(coding, weight)
    stored[name].copy_(to_bytes(codes, coding.bits))
    _put_scales(name, stored, scales, zeros)


def _quantize_to(weight: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Compiled code for what lies in host memory, torch elsewhere; several matrices on torch's number of threads."""
    if weight.ndim > 2:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(_quantize_to, weight, repeat(bits), codes, scales):
                pass
    elif weight.device.type == codes.device.type == "cpu" and weight.numel():
        matrix = weight.detach() if weight.dtype in FLOATS.values() else weight.detach().float()
        quantize_into(matrix.contiguous(), bits, _starts(bits), codes, scales)
    else:
        found_codes, found_scales = quantize(weight, bits)
        codes.copy_(found_codes)
        scales.copy_(found_scales)


def _starts(bits: int) -> list[float]:
    """What the entry of largest magnitude is divided by for the scales from where the search begins."""
    return [end / multiple for multiple in _STARTS[bits] for end in _RANGES[bits]]


def unpack(layout: RecordLayout, stored: Mapping[str, torch.Tensor]) -> ExpertWeights:
    """The weights of an expert, or of several: the tensors themselves in float formats, fp32 copies in quantised ones.

    Args:
        stored: [..., *shape] each, by the names of `layout.parts()`, as `layout.stored` has them of records.
    """
    coding = layout.coding
    weights = {
        name: unpack_matrix(coding, shape[-1], stored[name], stored[f"{name}_scale"], stored.get(f"{name}_zero"))
        if coding is not None and len(shape) == 2
        else stored[name]
        for name, shape in layout.shapes().items()
    }
    return ExpertWeights(*(weights.get(name) for name in ExpertWeights._fields))  # type: ignore[arg-type]


def unpack_matrix(
    coding: Coding, columns: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrix fp32 [..., n, columns] that stored codes, scales and zero points stand for."""
    if codes.ndim == 2 and codes.device.type == "cpu" and not has_nan(coding, codes):  # which compiled code cannot see
        return matrices.decode(coding, codes, columns, scales, zeros)
    return decode(coding, from_bytes(codes, columns, coding.bits), scales, zeros)


def quantize(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, as `RecordLayout` stores them, that approximate a matrix in the least-squares sense.

    From several scales around the one that maps the entry of largest magnitude to an end of the range, codes and scale
    are improved in turn: nearest codes for the scale, then the least-squares scale for the codes. The best is kept.

    Args:
        matrix: floating [..., n, m].
        bits: 8 or 4.

    Returns:
        uint8 [..., n, 32 g] or [..., n, 16 g], and fp16 [..., n, g].
    """
    groups = _groups(matrix.float())  # [..., n, g, 32]
    low, high = _RANGES[bits]
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (peak / high).half().float()
    error = _error(groups, scale, low, high)
    for start in _starts(bits):
        trial = (peak / start).half().float()
        for _ in range(_REFINEMENTS):
            codes = _nearest(groups, trial, low, high)
            norm = codes.square().sum(-1, keepdim=True)
            trial = ((groups * codes).sum(-1, keepdim=True) / norm.clamp_min(1)).half().float()
            found = _error(groups, trial, low, high)
            scale, error = torch.where(found < error, trial, scale), torch.minimum(found, error)
    codes = _nearest(groups, scale, low, high).to(torch.int8) + (8 if bits == 4 else 0)
    return to_bytes(codes.view(torch.uint8).flatten(-2), bits), scale[..., 0].half()


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def _nearest(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (groups * inverse).round().clamp(low, high)


def _error(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (groups - _nearest(groups, scale, low, high) * scale).square().sum(-1, keepdim=True)
