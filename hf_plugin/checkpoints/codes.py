"""Matrices of quantised checkpoints, each from the tensors that its method stores for it.

A method names the tensors that stand for one weight, and reads them as codes, scales and zero points; on the meta
device it tells no more than their form. Nothing here rounds: `CodedMatrix.numbers` is worth what the checkpoint says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moebius.kernels.encoding import to_bytes
from moebius.kernels.formats import GROUP, SCALES, Coding
from moebius.kernels.packing import CodedMatrix, has_nan

Tensors = Mapping[str, torch.Tensor]  # of one weight, by the end of their names

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output j of eight lies in an int32
_E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
_SCALE_NAMES = {dtype: name for name, dtype in SCALES.items()}


@dataclass(frozen=True, slots=True)
class Method:
    """One way to store a quantised weight.

    Args:
        weight: end of the weight's name in a model.
        names: ends of the names of the tensors that stand for it; the first one is always there, or the weight is
            not quantised.
        read: makes a matrix of those that there are, or raises ValueError.
        unkept: why its codes cannot be kept, or None.
    """

    weight: str
    names: tuple[str, ...]
    read: Callable[[Tensors], CodedMatrix]
    unkept: str | None = None


def methods(config: Mapping[str, Any]) -> list[Method]:
    """The methods of a checkpoint with this `quantization_config`.

    Raises:
        ValueError: none is known; the message names what is.
    """
    match str(getattr(name := config.get("quant_method"), "value", name)):
        case "fp8":
            size = _block_size(config.get("weight_block_size"))
            return [Method("weight", ("weight", "weight_scale_inv"), lambda tensors: _fp8(tensors, size))]
        case "mxfp4":
            return [
                Method(name, (f"{name}_blocks", f"{name}_scales"), _mxfp4) for name in ("gate_up_proj", "down_proj")
            ]
        case "gptq":
            return [_gptq_method(config)]
        case "awq":
            return [_awq_method(config)]
        case "compressed-tensors":
            return [_compressed_method(config)]
    raise ValueError(
        f"the checkpoint is quantised with {config.get('quant_method')}; experts are read from fp8, mxfp4, gptq, awq "
        "and compressed-tensors checkpoints: take one of these, or load it with transformers so that its experts are "
        "dequantised (fp32, bf16 or fp16), then moebius.patch(model)"
    )


def check(matrix: CodedMatrix) -> None:
    """Raise ValueError for numbers that no weight can have."""
    scales = matrix.scales
    bad = (scales == 255).any() if scales.dtype == torch.uint8 else ~torch.isfinite(scales).all()
    if bad:
        raise ValueError("scales are NaN or infinite")
    if has_nan(matrix.coding, matrix.codes):
        raise ValueError("weights are NaN")


def _scales(scales: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Scales in a type that records have, and its name."""
    if scales.dtype == _E8M0:
        scales = scales.view(torch.uint8)
    if scales.dtype not in _SCALE_NAMES:
        raise ValueError(f"scales are {scales.dtype}; supported are fp32, bf16, fp16 and e8m0")
    return scales, _SCALE_NAMES[scales.dtype]


def _block_size(size: Any) -> Any:
    """Rows and columns of a block, as configured; None: not said."""
    if size is None or (
        isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        return size
    raise ValueError(f"the configuration has blocks of {size!r}, which are not rows and columns")


def _block(name: str, size: int, count: int, configured: int | None) -> int:
    """How many of `size` rows or columns share each of `count` scales; 0: all."""
    if configured is not None:
        if -(-size // configured) != count:
            raise ValueError(f"{count} scales along {size} {name}, where the configuration has blocks of {configured}")
        return configured
    if count == 1:
        return 0
    if not count or size % count:
        raise ValueError(f"{count} scales along {size} {name} belong to no whole blocks")
    return size // count


def _of_blocks(code: str, columns: int, codes: torch.Tensor, scales: torch.Tensor, size: Any) -> CodedMatrix:
    """From codes as records have them, and scales of blocks of a size."""
    scales, scale = _scales(scales)
    n, m = len(codes), columns
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    if scales.ndim != 2:
        raise ValueError(f"scales have the shape {tuple(scales.shape)} beside weights of {(n, m)}")
    rows = _block("rows", n, scales.shape[0], size[0] if size else None)
    together = _block("columns", m, scales.shape[1], size[1] if size else None)
    return CodedMatrix(Coding(code, rows, together, scale), m, codes, scales)


def _of_bytes(code: str, codes: torch.Tensor, scales: torch.Tensor, size: Any) -> CodedMatrix:
    """From codes [n, m], one to a byte."""
    return _of_blocks(code, codes.shape[1], to_bytes(codes, 8), scales, size)


def _fp8(tensors: Tensors, size: Any) -> CodedMatrix:
    weight, scales = tensors["weight"], tensors["weight_scale_inv"]
    if weight.dtype in (torch.int8, torch.uint8):  # e2m1, two to a byte
        matrix = _of_blocks("e2m1", 2 * weight.shape[1], weight.view(torch.uint8), scales, None)
        return replace(matrix, paired=True)
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weights are {weight.dtype}, not e4m3")
    return _of_bytes("e4m3", weight.view(torch.uint8), scales, size)


def _mxfp4(tensors: Tensors) -> CodedMatrix:
    blocks, scales = (next(t for name, t in tensors.items() if name.endswith(end)) for end in ("blocks", "scales"))
    if blocks.dtype != torch.uint8 or blocks.shape[-1] != GROUP // 2 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks {blocks.dtype} {list(blocks.shape)} do not belong to scales {list(scales.shape)}")
    scales, scale = _scales(scales)
    pairs = blocks.flatten(-2)
    return CodedMatrix(Coding("e2m1", 1, GROUP, scale), 2 * pairs.shape[-1], pairs, scales, paired=True)


def _words(packed: torch.Tensor) -> torch.Tensor:
    if packed.dtype != torch.int32:
        raise ValueError(f"packed weights are {packed.dtype}, not int32")
    return packed


def _unpacked(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes uint8 that int32 numbers hold along a dimension, lowest bits first."""
    shifts = range(0, 32, bits)
    parts = [((_words(packed) >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in shifts]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def _int4(
    columns: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    size: int | None,
    order: torch.Tensor | None = None,
) -> CodedMatrix:
    """From codes as records have them, and [n, blocks] each; `order` is each column's block, where that is stored."""
    scales, scale = _scales(scales)
    together = _block("columns", columns, scales.shape[1], size)
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zero points {list(zeros.shape)} do not belong to scales {list(scales.shape)}")
    matrix = CodedMatrix(Coding("int4", 1, together, scale, zeros is not None), columns, codes, scales, zeros)
    if order is None or order.is_meta:
        return matrix
    if order.shape != (columns,) or not ((order >= 0) & (order < scales.shape[1])).all():
        raise ValueError(f"g_idx {list(order.shape)} does not give each of {columns} columns one of their groups")
    if together == 0:
        return matrix
    plain = torch.equal(order.long(), torch.arange(len(order), device=order.device) // together)
    return matrix if plain else replace(matrix, order=order.long())


def _group_size(config: Mapping[str, Any]) -> int | None:
    """Columns that share a scale, as configured; None: all of a row, or not said."""
    size = int(config.get("group_size") or -1)
    return size if size > 0 else None


def _gptq_method(config: Mapping[str, Any]) -> Method:
    if config.get("bits") != 4:
        raise ValueError(f"the checkpoint has GPTQ weights of {config.get('bits')!r} bits; 4 are supported")
    above = 0 if config.get("checkpoint_format") == "gptq_v2" else 1  # what zero points are stored less
    ordered = bool(config.get("desc_act")) and config.get("group_size") != -1

    def read(tensors: Tensors) -> CodedMatrix:
        zeros = (_unpacked(tensors["qzeros"], 4, 1) + above).T
        codes, scales = _unpacked(tensors["qweight"], 4, 0).T, tensors["scales"].T
        size = _group_size(config)
        matrix = _int4(codes.shape[1], to_bytes(codes, 4), scales, zeros, size, tensors.get("g_idx"))
        if matrix.order is not None and not ordered:
            raise ValueError("g_idx orders columns by activation, but the configuration has desc_act=false")
        return matrix

    reason = "its columns are grouped by activation order (desc_act)" if ordered else None
    return Method("weight", ("qweight", "qzeros", "scales", "g_idx"), read, reason)


def _awq_method(config: Mapping[str, Any]) -> Method:
    bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
    if bits != 4 or str(version).lower() != "gemm":
        raise ValueError(f"the checkpoint has AWQ weights of {bits!r} bits in {version}; 4 in gemm are supported")

    def in_order(packed: torch.Tensor) -> torch.Tensor:  # [rows, outputs]
        return _unpacked(packed, 4, 1).unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)

    def read(tensors: Tensors) -> CodedMatrix:
        codes, zeros = in_order(tensors["qweight"]).T, in_order(tensors["qzeros"]).T
        return _int4(codes.shape[1], to_bytes(codes, 4), tensors["scales"].T, zeros, _group_size(config))

    return Method("weight", ("qweight", "qzeros", "scales"), read)


def _compressed_method(config: Mapping[str, Any]) -> Method:
    try:
        weights = [group.get("weights") or {} for group in config.get("config_groups", {}).values()]
    except AttributeError as error:
        raise ValueError(f"the checkpoint's config_groups are not groups of weights ({error})") from error
    kinds = {(w.get("type"), w.get("num_bits"), bool(w.get("symmetric", True))) for w in weights}
    ordered = any(w.get("actorder") in ("group", True) for w in weights)
    known = {("int", 4, True), ("int", 4, False), ("int", 8, True), ("float", 8, True)}
    if len(kinds) != 1 or not kinds <= known:
        found = ", ".join(f"{bits}-bit {type}" + "" if even else " with zero points" for type, bits, even in kinds)
        raise ValueError(
            f"the checkpoint has compressed-tensors weights in {found or 'no format'}; supported is one of int4, "
            "symmetric int8 and float8"
        )
    bits = int(weights[0]["num_bits"])
    block = _block_size(weights[0].get("block_structure"))

    def read(tensors: Tensors) -> CodedMatrix:
        scales = tensors["weight_scale"]
        if (plain := tensors.get("weight")) is not None:
            return _of_bytes({torch.int8: "int8"}.get(plain.dtype, "e4m3"), plain.view(torch.uint8), scales, block)
        packed = _words(tensors["weight_packed"]).view(torch.uint8)
        rows, columns = len(packed), packed.shape[1] * 8 // bits
        if (shape := tensors.get("weight_shape")) is not None and not shape.is_meta:
            if shape.shape != (2,):
                raise ValueError(f"weight_shape has {shape.numel()} numbers")
            rows, columns = int(shape[0]), int(shape[1])
        if bits == 8:
            return _of_bytes("int8", packed[:rows, :columns] ^ 128, scales, block)
        points = tensors.get("weight_zero_point")
        zeros = None if points is None else _unpacked(points, 4, 0)[:rows]
        order = tensors.get("weight_g_idx") if ordered else None
        codes = packed[:rows, : -(-columns // 2)]
        matrix = _int4(columns, codes, scales.reshape(rows, -1), zeros, _group_size(weights[0]), order)
        return replace(matrix, paired=True)

    packed = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    plain = ("weight", "weight_scale", "weight_zero_point")
    is_packed = config.get("format", "pack-quantized") == "pack-quantized"
    reason = "its columns are grouped by activation order (actorder)" if ordered else None
    return Method("weight", packed if is_packed else plain, read, reason)
