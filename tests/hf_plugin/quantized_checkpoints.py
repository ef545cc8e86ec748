"""Tiny quantised checkpoints, written as the methods' own tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moebius.kernels.encoding import encode
from moebius.kernels.formats import Coding
from tests import zoo

Tensors = dict[str, torch.Tensor]


def _wants(key: str, tensor: torch.Tensor) -> bool:
    """Matrices of experts and of attention."""
    parts = key.split(".")
    linear = parts[-2].endswith("_proj") and "attn" in key
    return key.endswith(".weight") and tensor.ndim == 2 and (linear or ("experts" in parts and parts[-3].isdigit()))


def fp8(matrix: torch.Tensor, size: tuple[int, int] = (32, 32)) -> Tensors:
    codes, scales, _ = encode(Coding("e4m3", *size, "fp32"), matrix)
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}


def _packed(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes along a dimension into int32, lowest bits first."""
    groups = codes.long().unflatten(dim, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits).view([-1] + [1] * (codes.ndim - dim - 1))
    return (groups << shifts).sum(dim + 1).to(torch.int32)


def gptq(matrix: torch.Tensor, symmetric: bool = False, order: torch.Tensor | None = None) -> Tensors:
    if order is not None:  # columns that share a scale need not be neighbours
        matrix = matrix[:, order.argsort(stable=True)]
    codes, scales, zeros = encode(Coding("int4", 1, 32, "fp16", zeros=True), matrix)
    assert zeros is not None
    zeros = zeros.clamp(min=1)
    groups = torch.arange(matrix.shape[1]) // 32
    if order is not None:
        codes, groups = codes[:, order.argsort(stable=True).argsort()], order
    return {
        "qweight": _packed(codes.T, 4, 0), "qzeros": _packed(zeros.T - 1, 4, 1),
        "scales": scales.T.contiguous(), "g_idx": groups.to(torch.int32),
    }  # fmt: skip


def awq(matrix: torch.Tensor) -> Tensors:
    codes, scales, zeros = encode(Coding("int4", 1, 32, "fp16", zeros=True), matrix)
    assert zeros is not None

    def packed(numbers: torch.Tensor) -> torch.Tensor:  # [rows, outputs]
        return _packed(numbers.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4, 1)

    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.contiguous()}


def packed_int4(matrix: torch.Tensor, zeros: bool = False) -> Tensors:
    codes, scales, points = encode(Coding("int4", 1, 32, "bf16", zeros), matrix)
    shape = {"weight_shape": torch.tensor(matrix.shape)}
    found = {"weight_packed": _packed(codes, 4, 1), "weight_scale": scales, **shape}
    return found | ({"weight_zero_point": _packed(points, 4, 0)} if points is not None else {})


def int8(matrix: torch.Tensor) -> Tensors:
    codes, scales, _ = encode(Coding("int8", 1, 0, "bf16"), matrix)
    return {"weight": codes.view(torch.int8), "weight_scale": scales}


def float8(matrix: torch.Tensor) -> Tensors:
    codes, scales, _ = encode(Coding("e4m3", 0, 0, "bf16"), matrix)
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales.reshape(1)}


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


# how a matrix is written, and the checkpoint's quantization_config
METHODS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "int4": (packed_int4, _compressed("pack-quantized", type="int", num_bits=4, group_size=32, symmetric=True)),
    "int4-zeros": (
        lambda matrix: packed_int4(matrix, True),
        _compressed("pack-quantized", type="int", num_bits=4, group_size=32, symmetric=False),
    ),
    "int8": (int8, _compressed("int-quantized", type="int", num_bits=8, strategy="channel", symmetric=True)),
    "float8": (float8, _compressed("float-quantized", type="float", num_bits=8, strategy="tensor", symmetric=True)),
}


def write(
    name: str,
    folder: Path,
    method: str,
    change: Callable[[Tensors], None] | None = None,
    quantise: Callable[[torch.Tensor], Tensors] | None = None,
    **config: Any,
) -> None:
    """Save a zoo model in bf16, quantised.

    Args:
        change: damages the tensors.
        quantise: instead of the method's own.
        config: more of its `quantization_config`.
    """
    zoo.build(name).bfloat16().save_pretrained(folder)
    usual, entries = METHODS[method]
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        parts = (quantise or usual)(tensor.float()) if _wants(key, tensor) else {"weight": tensor}
        stem = key.removesuffix("weight") if _wants(key, tensor) else key.removesuffix(key.rpartition(".")[2])
        tensors |= {f"{stem}{end}" if _wants(key, tensor) else key: part for end, part in parts.items()}
    finish(folder, tensors, entries | config, change)


def write_mxfp4(folder: Path, change: Callable[[Tensors], None] | None = None) -> None:
    """Save the zoo's gpt-oss as its releases are."""
    zoo.build("gpt_oss").bfloat16().save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 3 and "experts" in key:
            found = [encode(Coding("e2m1", 1, 32, "e8m0"), matrix.T.float()) for matrix in tensor]
            codes, scales = (torch.stack([pair[i] for pair in found]) for i in (0, 1))
            pairs = codes.unflatten(-1, (-1, 16, 2))
            tensors |= {f"{key}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{key}_scales": scales}
        else:
            tensors[key] = tensor
    finish(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, change)


def write_plain(folder: Path, target: Path) -> None:
    """What a checkpoint is worth, as a stock one in fp32; the formulas of the methods' authors, once more."""
    tensors, plain = load_file(folder / "model.safetensors"), {}
    config = json.loads((folder / "config.json").read_text())
    method = config.pop("quantization_config")["quant_method"]
    stems = {
        key.rpartition(".")[0] for key in tensors if key.endswith((".qweight", ".weight_scale", ".weight_scale_inv"))
    }
    for stem in stems:
        mine = {key.removeprefix(f"{stem}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{stem}.")}
        plain[f"{stem}.weight"] = _FORMULAS[method](mine)
    target.mkdir(exist_ok=True)
    stored = {key: tensor.float().contiguous() for key, tensor in (tensors | plain).items()}
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def _nibble(
    packed: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, along: int, place: torch.Tensor
) -> torch.Tensor:
    word = packed[rows // 8 if along == 0 else rows, columns // 8 if along == 1 else columns].long() & 0xFFFFFFFF
    return (word >> (4 * place)) & 15


def _gptq_worth(t: Tensors) -> torch.Tensor:
    i, o = torch.meshgrid(torch.arange(len(t["g_idx"])), torch.arange(t["scales"].shape[1]), indexing="ij")
    group = t["g_idx"].long()[i]
    zero = _nibble(t["qzeros"], group, o, 1, o % 8) + 1
    return ((_nibble(t["qweight"], i, o, 0, i % 8) - zero) * t["scales"].float()[group, o]).T


def _awq_worth(t: Tensors) -> torch.Tensor:
    i, o = torch.meshgrid(torch.arange(len(t["qweight"])), torch.arange(t["scales"].shape[1]), indexing="ij")
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])[o % 8]
    group = i // (len(t["qweight"]) // len(t["scales"]))
    zero = _nibble(t["qzeros"], group, o, 1, place)
    return ((_nibble(t["qweight"], i, o, 1, place) - zero) * t["scales"].float()[group, o]).T


def _compressed_worth(t: Tensors) -> torch.Tensor:
    scale = t["weight_scale"].float()
    if "weight" in t:
        return t["weight"].float() * scale
    o, i = torch.meshgrid(*(torch.arange(int(size)) for size in t["weight_shape"]), indexing="ij")
    group = i // (i.shape[1] // scale.shape[1])
    points = t.get("weight_zero_point")
    zero = 8 if points is None else _nibble(points, o, group, 0, o % 8)
    return (_nibble(t["weight_packed"], o, i, 1, i % 8) - zero) * scale[o, group]


def _fp8_worth(t: Tensors) -> torch.Tensor:
    o, i = torch.meshgrid(*(torch.arange(size) for size in t["weight"].shape), indexing="ij")
    return t["weight"].float() * t["weight_scale_inv"][o // 32, i // 32]


_FORMULAS = {"fp8": _fp8_worth, "gptq": _gptq_worth, "awq": _awq_worth, "compressed-tensors": _compressed_worth}


def finish(folder: Path, tensors: Tensors, config: dict[str, Any], change: Callable[[Tensors], None] | None) -> None:
    """Write the tensors and the configuration."""
    if change is not None:
        change(tensors)
    stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
