"""Quantised checkpoints: experts stay as they are, and are worth what transformers' dequantised load is worth."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebius
from tests import zoo

from .helpers import experts_modules
from .quantized_checkpoints import METHODS, Tensors, gptq, write, write_mxfp4, write_plain

FP8 = ("qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral", "nemotron_h", "minimax_m2")
FORMATS = {
    "fp8": "e4m3-32x32-fp32", "gptq": "int4-1x32-fp16-zeros", "awq": "int4-1x32-fp16-zeros", "int4": "int4-1x32-bf16",
    "int4-zeros": "int4-1x32-bf16-zeros", "int8": "int8-1x0-bf16", "float8": "e4m3-0x0-bf16",
}  # fmt: skip


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**zoo.inputs(model)).logits


def formats(model: PreTrainedModel) -> list[str]:
    return [module._moebius.held.layout.format for module in experts_modules(model)]  # type: ignore[union-attr]


def assert_same_weights(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def check_against_plain(folder: Path, plain: Path, format: str) -> None:
    """The same numbers in fp32, and the same weights after unpatching."""
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).float()  # 5.17 leaves MXFP4 in bf16
    expected = logits(stock)
    for device in ("cpu", "emulated"):
        model = moebius.from_pretrained(str(folder), device=device, gpu_memory=0.5, dtype=torch.float32)
        assert set(formats(model)) == {format}
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
        moebius.unpatch(model)
        assert_same_weights(model, stock)


def error(model: PreTrainedModel, exact: torch.Tensor) -> float:
    return ((logits(model).double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", FP8)
def test_fp8_weights_are_those_of_the_dequantised_load(name: str, tmp_path: Path) -> None:
    """Bug: scales of other blocks, gate and up exchanged, attention left out, weights rounded twice."""
    write(name, tmp_path / "fp8", "fp8")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    model = moebius.from_pretrained(str(tmp_path / "fp8"), device="cpu")
    write_plain(tmp_path / "fp8", tmp_path / "plain")
    exact = logits(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64, experts_implementation="eager")
    )
    assert error(model, exact) <= 1.1 * error(stock, exact)
    moebius.unpatch(model)
    assert_same_weights(model, stock)
    check_against_plain(tmp_path / "fp8", tmp_path / "plain", FORMATS["fp8"])


def test_mxfp4_experts_are_those_of_the_dequantised_load(tmp_path: Path) -> None:
    """Bug: gate and up rows not taken apart, nibbles in the wrong order."""
    write_mxfp4(tmp_path)
    check_against_plain(tmp_path, tmp_path, "mxfp4")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fp8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_integer_experts_are_worth_what_their_formula_says(name: str, method: str, tmp_path: Path) -> None:
    """Bug: packed along the other dimension, AWQ's order, GPTQ's zero points that are stored less one."""
    write(name, tmp_path / "quantized", method)
    write_plain(tmp_path / "quantized", tmp_path / "plain")
    check_against_plain(tmp_path / "quantized", tmp_path / "plain", FORMATS[method])


def test_other_formats_are_made_of_the_dequantised_weights(tmp_path: Path) -> None:
    """`expert_format` wins over what the checkpoint has."""
    write("qwen3_moe", tmp_path, "fp8")
    write_plain(tmp_path, tmp_path / "plain")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    for format, bound in (("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05)):
        model = moebius.from_pretrained(str(tmp_path), device="cpu", expert_format=format, dtype=torch.float32)
        assert set(formats(model)) == {format}
        assert (logits(model) - expected).abs().max() <= bound * expected.abs().max()


def test_columns_in_activation_order_are_converted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: codes whose groups are not neighbours, kept as if they were."""

    def ordered(matrix: torch.Tensor) -> Tensors:
        groups = matrix.shape[1] // 32
        shuffled = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(0))
        return gptq(matrix, order=shuffled % groups)

    write("qwen3_moe", tmp_path / "quantized", "gptq", quantise=ordered, desc_act=True)
    write_plain(tmp_path / "quantized", tmp_path / "plain")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32))
    with caplog.at_level(logging.WARNING):
        model = moebius.from_pretrained(str(tmp_path / "quantized"), device="cpu", dtype=torch.float32)
    assert set(formats(model)) == {"fp32"}
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len([record for record in caplog.records if "activation order" in record.message]) == 1


def test_experts_that_are_not_quantised_stay_floats(tmp_path: Path) -> None:
    """Bug: `modules_to_not_convert` ignored."""

    def plain(tensors: Tensors) -> None:
        for key in [key for key in tensors if "layers.0.mlp.experts" in key and key.endswith("scale_inv")]:
            weight, scale = key.removesuffix("_scale_inv"), tensors.pop(key)
            scale = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            tensors[weight] = (tensors[weight].float() * scale).bfloat16()

    write("qwen3_moe", tmp_path, "fp8", plain, modules_to_not_convert=["model.layers.0.mlp.experts"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = moebius.from_pretrained(str(tmp_path), device="cpu")
    assert formats(model) == ["bf16", FORMATS["fp8"]]
    moebius.unpatch(model)
    assert_same_weights(model, stock)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_saving_writes_a_dequantised_stock_checkpoint(method: str, tmp_path: Path) -> None:
    """Bug: saved without experts, with codes, or with a quantization_config that no longer holds."""
    source, target = tmp_path / "quantized", tmp_path / "saved"
    if method == "mxfp4":
        write_mxfp4(source)
    else:
        write("mixtral", source, method)
    stock = AutoModelForCausalLM.from_pretrained(source)
    model = moebius.from_pretrained(str(source), device="cpu")
    model.save_pretrained(target)
    saved = AutoModelForCausalLM.from_pretrained(target)
    assert getattr(saved.config, "quantization_config", None) is None
    assert_same_weights(saved, stock)
    names = load_file(target / "model.safetensors")
    assert not [name for name in names if "scale" in name or "blocks" in name]


EXPERT = "model.layers.1.mlp.experts.3.gate_proj"


def _nan_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight_scale_inv"][0, 0] = float("nan")


def _nan_weight(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight"].view(torch.uint8)[5, 5] = 0x7F


def _no_scale(tensors: Tensors) -> None:
    del tensors[f"{EXPERT}.weight_scale_inv"]


def _cut_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight_scale_inv"] = torch.ones(3, 5)


def _integer_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight_scale_inv"] = torch.ones(1, 2, dtype=torch.int32)


def _other_weight(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight"] = torch.zeros(32, 64, dtype=torch.float8_e5m2)


@pytest.mark.parametrize(
    "change", [_nan_scale, _nan_weight, _no_scale, _cut_scale, _integer_scale, _other_weight], ids=lambda f: f.__name__
)
def test_bad_tensors_are_named_with_their_file(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    """Bug: a wrong model, or an error that says nothing."""
    write("qwen3_moe", tmp_path, "fp8", change)
    with pytest.raises(ValueError, match=rf"{re.escape(EXPERT)}.*model\.safetensors"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_a_load_that_fails_leaves_no_thread_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: raised before the intake is closed, whose threads and half a file then wait for the collector."""

    def damage(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"][0, 0] = float("nan")

    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path / "cache"))
    write("qwen3_moe", tmp_path / "model", "fp8", damage)
    with pytest.raises(ValueError, match=r"q_proj.*model\.safetensors.*again") as held:
        moebius.from_pretrained(str(tmp_path / "model"), device="cpu", cpu_memory=0.5)
    assert held.tb is not None, "which holds all that the load held"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moebius-")]
    assert not [*(tmp_path / "cache").rglob("*.partial")]


def test_bad_scales_of_mxfp4_are_named(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 3, 0] = 255

    write_mxfp4(tmp_path, damage)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks in .*model\.safetensors"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_other_methods_are_refused(tmp_path: Path) -> None:
    write("qwen3_moe", tmp_path, "fp8", quant_method="bitsandbytes")
    with pytest.raises(ValueError, match=r"bitsandbytes.*fp8, mxfp4, gptq, awq and compressed-tensors.*patch"):
        moebius.from_pretrained(str(tmp_path), device="cpu")
