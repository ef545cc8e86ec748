"""Configurations and small tensors of checkpoints that say what cannot be: an error, never other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moebius
from moebius.hf_plugin.checkpoints import converting
from tests import zoo
from tests.hf_plugin import quantized_checkpoints

Tensors = dict[str, torch.Tensor]
STEM = "model.layers.1.mlp.experts.3.up_proj."  # of the tensors that are damaged


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[STEM + end] = change(tensors[STEM + end].clone())

    return damage


def with_first(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def shorter(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :-1].contiguous()


ORDERED = {"desc_act": True}
TENSORS: list[tuple[str, dict[str, Any], Callable[[Tensors], None], str]] = [
    ("fp8", {}, changed("weight_scale_inv", shorter), r"1 scales along 64 columns, where .* blocks of 32"),
    ("gptq", {}, changed("scales", lambda scales: scales[:1].contiguous()), r"1 scales along 64 .* blocks of 32"),
    ("awq", {}, changed("scales", lambda scales: scales[:0].contiguous()), r"0 scales along 64 .* blocks of 32"),
    ("awq", {"group_size": -1}, changed("scales", lambda scales: scales[:0].contiguous()), r"no whole blocks"),
    ("gptq", {}, changed("qzeros", lambda zeros: zeros[:1].contiguous()), r"zero points .* do not belong to scales"),
    ("awq", {}, changed("qzeros", shorter), r"zero points .* do not belong to scales"),
    ("gptq", ORDERED, changed("g_idx", with_first(1000)), r"g_idx \[64\] does not give each of 64 columns"),
    ("gptq", ORDERED, changed("g_idx", with_first(-1)), r"g_idx \[64\] does not give each of 64 columns"),
    ("gptq", {}, changed("g_idx", shorter), r"g_idx \[63\] does not give each of 64 columns"),
    ("int4", {}, changed("weight_shape", shorter), r"weight_shape has 1 numbers"),
]


@pytest.mark.parametrize(("method", "config", "damage", "message"), TENSORS)
def test_tensors(
    method: str, config: dict[str, Any], damage: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    """Bug: one scale is taken for all blocks, an index reads past the scales, or an error of torch names no file."""
    quantized_checkpoints.write("qwen3_moe", tmp_path, method, damage, **config)
    with pytest.raises(ValueError, match=rf"(?s)experts.*model\.safetensors.*{message}.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


CONFIGURATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("fp8", {"weight_block_size": "x"}, r"blocks of 'x', which are not rows and columns"),
    ("fp8", {"weight_block_size": [0, 0]}, r"blocks of \[0, 0\], which are not rows and columns"),
    ("fp8", {"weight_block_size": [32]}, r"blocks of \[32\], which are not rows and columns"),
    ("gptq", {"bits": "4"}, r"GPTQ weights of '4' bits"),
    ("awq", {"bits": 8}, r"AWQ weights of 8 bits in gemm"),
    ("int8", {"config_groups": []}, r"config_groups are not groups of weights"),
    ("fp8", {"quant_method": "other"}, r"quantised with other; experts are read from .*moebius\.patch"),
]


@pytest.mark.parametrize(("method", "change", "message"), CONFIGURATIONS)
def test_configurations(method: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Bug: a division by zero, an attribute that a list does not have."""
    quantized_checkpoints.write("qwen3_moe", tmp_path, method)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        moebius.from_pretrained(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(raised.value)


def test_a_configuration_of_another_model(tmp_path: Path) -> None:
    """Bug: an error of transformers, which names no file."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights in {tmp_path} have other shapes .* again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_an_architecture_that_is_no_model(tmp_path: Path) -> None:
    """Bug: whatever transformers has under a name in a file is called."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["AutoTokenizer"]}))
    assert moebius.is_patched(moebius.from_pretrained(str(tmp_path), device="cpu"))


@pytest.mark.parametrize("gone", ["metadata", "moebius_conversions"])
def test_the_index_of_a_converted_checkpoint(gone: str, tmp_path: Path) -> None:
    """Bug: a KeyError; or a model that loads, and is saved in another layout than its original's."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path / "stock")
    folder = converting.convert(tmp_path / "stock", tmp_path / "converted")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (index if gone == "metadata" else index["metadata"]).pop(gone)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{path} .*{gone}.* again"):
        moebius.from_pretrained(str(folder), device="cpu")
