"""Weights into records and back, in every format; quantisation is done here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from moebius.kernels.experts import BITS, FLOATS, GROUP, ExpertWeights, RecordLayout
from moebius.kernels.numba.quantizer import quantize_into

_RANGES = {8: (-127, 127), 4: (-8, 7)}  # of codes
# Multiples of the scale that maps a group's largest weight to the end of the range, from where the search begins
_STARTS = {8: (1.0,), 4: (1.0, 0.88, 0.77)}
_REFINEMENTS = 2  # rounds of codes for the scale, then the best scale for the codes


def pack(layout: RecordLayout, records: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
    """Write weights into records, converting or quantising them.

    Args:
        records: uint8 [..., layout.nbytes].
        weights: some or all of the layout's weights by name, [..., *shape], of any floating dtype.
    """
    stored = layout.stored(records)
    for name, weight in weights.items():
        if layout.quantized and f"{name}_scale" in stored:
            _quantize_to(weight, BITS[layout.format], stored[name], stored[f"{name}_scale"])
        else:
            stored[name].copy_(weight)


def _quantize_to(weight: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Compiled code for what lies in host memory, torch elsewhere."""
    if weight.ndim > 2:
        for index in range(len(weight)):
            _quantize_to(weight[index], bits, codes[index], scales[index])
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


def unpack(layout: RecordLayout, records: torch.Tensor) -> ExpertWeights:
    """The weights of records (uint8 [..., layout.nbytes]): views in float formats, fp32 copies in quantised ones."""
    if not layout.quantized:
        return layout.view(records)
    stored, bits = layout.stored(records), BITS[layout.format]
    weights = {
        name: dequantize(stored[name], stored[f"{name}_scale"], shape[-1], bits) if len(shape) == 2 else stored[name]
        for name, shape in layout.shapes().items()
    }
    return ExpertWeights(*(weights.get(name) for name in ExpertWeights._fields))  # type: ignore[arg-type]


def quantize(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, as `RecordLayout` stores them, that approximate a matrix in the least-squares sense.

    From several scales around the one that maps the entry of largest magnitude to an end of the range, codes and scale
    are improved in turn: nearest codes for the scale, then the least-squares scale for the codes. The best is kept.

    Args:
        matrix: floating [..., n, m].
        bits: 8 or 4.

    Returns:
        int8 [..., n, 32 g] or uint8 [..., n, 16 g], and fp16 [..., n, g].
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
    codes = _nearest(groups, scale, low, high).to(torch.int8)
    scales = scale[..., 0].half()
    if bits == 8:
        return codes.flatten(-2), scales
    shifted = (codes + 8).to(torch.uint8)
    half = GROUP // 2
    return (shifted[..., :half] | shifted[..., half:] << 4).flatten(-2), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """The matrix fp32 [..., n, columns] that `quantize` stored."""
    if bits == 8:
        numbers = codes.unflatten(-1, (-1, GROUP)).float()
    else:
        packed = codes.unflatten(-1, (-1, GROUP // 2))
        numbers = torch.cat([packed & 15, packed >> 4], dim=-1).float() - 8
    return (numbers * scales[..., None].float()).flatten(-2)[..., :columns]


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def _nearest(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (groups * inverse).round().clamp(low, high)


def _error(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (groups - _nearest(groups, scale, low, high) * scale).square().sum(-1, keepdim=True)
