"""What users hand to `from_pretrained` beside the name: as with stock, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import moebius
from tests import zoo
from tests.hf_plugin import quantized_checkpoints

EMULATED = {"device": "emulated", "gpu_memory": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same in shards of a variant below, and an adapter."""
    path = tmp_path_factory.mktemp("model")
    stock = zoo.build("qwen3_moe")
    stock.save_pretrained(path)
    stock.save_pretrained(path / "below", variant="other", max_shard_size="100KB")
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**zoo.inputs(model)).logits


ARGUMENTS: dict[str, dict[str, Any]] = {
    "dtype by name": {"dtype": "bfloat16"},
    "old name of dtype": {"torch_dtype": torch.bfloat16},
    "dtype of the file": {"torch_dtype": "auto"},
    "shards of a variant, below": {"subfolder": "below", "variant": "other"},
    "revision": {"revision": "main"},
    "every module": {
        "device_map": dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "lm_head"), "cpu")
    },
    "a device": {"device_map": torch.device("cpu")},
    "balanced": {"device_map": "balanced", "max_memory": {"cpu": "1GiB"}},
    "what was an option": {"low_cpu_mem_usage": True},
    "attention": {"attn_implementation": "eager"},
    "values of the configuration": {"num_experts_per_tok": 1, "rms_norm_eps": 0.5},
    "values and dtype": {"num_experts_per_tok": 1, "dtype": "auto", "trust_remote_code": False},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_stock(arguments: dict[str, Any], folder: Path) -> None:
    """Bug: an argument that is dropped on the way, or looked up in another folder."""
    model = moebius.from_pretrained(str(folder), **EMULATED, **arguments)
    stock = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert model.dtype == stock.dtype
    expected = logits(stock)
    bound = 1e-5 if stock.dtype == torch.float32 else 0.02
    assert (logits(model) - expected).abs().max() <= bound * expected.abs().max()


def test_a_configuration_that_was_changed(folder: Path) -> None:
    """Bug: the checkpoint's own is used."""
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = 1
    model = moebius.from_pretrained(str(folder), config=config, **EMULATED)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, config=config))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_dtype_of_a_quantised_checkpoint_by_its_old_name(tmp_path: Path) -> None:
    """Bug: the dtype of the configuration is used."""
    quantized_checkpoints.write("qwen3_moe", tmp_path, "fp8")
    assert moebius.from_pretrained(str(tmp_path), **EMULATED, torch_dtype=torch.float32).dtype == torch.float32


def test_a_misspelt_option(folder: Path) -> None:
    """Bug: an error of the model's class, which knows nothing of options."""
    message = r"unknown option 'gpu_memroy'.*did you mean 'gpu_memory'\? Options are .*cpu_threads"
    with pytest.raises(TypeError, match=message):
        moebius.from_pretrained(str(folder), gpu_memroy="8GiB")
    with pytest.raises(TypeError, match=message):
        moebius.MoebiusConfig(gpu_memroy="8GiB")
    with pytest.raises(TypeError, match=message):
        moebius.patch(zoo.build("qwen3_moe"), gpu_memroy="8GiB")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two ways to quantise": (
        {"quantization_config": BitsAndBytesConfig()},
        r"takes no quantization_config.*leave it out",
    ),
    "both ways to load": (
        {"quantization_config": moebius.MoebiusConfig()},
        r"takes no quantization_config.*leave it out",
    ),
    "too little memory": ({"device_map": "auto", "max_memory": {"cpu": "1KiB"}}, r"device_map puts modules on disk"),
    "a GPU that is not there": (
        {"device_map": "cuda:99"},
        r"puts modules on cuda:99, which is not there .*device_map='cpu'",
    ),
    "its number": ({"device_map": {"": 99}}, r"puts modules on 99, which is not there .*device_map='cpu'"),
    "no data": ({"device_map": "meta"}, r"puts modules on meta, .*device_map='cpu'"),
    "no modules": ({"device_map": {}}, r"device_map is empty: leave it out"),
    "no device": ({"device_map": 3.5}, r"puts modules on 3\.5, which is not there .*device_map='cpu'"),
    "an adapter": ({"subfolder": "adapter"}, r"has an adapter and no model.*load_adapter"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        moebius.from_pretrained(str(folder), **EMULATED, **arguments)


def test_a_configuration_by_its_path(folder: Path) -> None:
    """Bug: a path is taken for the configuration itself."""
    model = moebius.from_pretrained(str(folder), config=str(folder), num_experts_per_tok=1, **EMULATED)
    assert model.config.num_experts_per_tok == 1


def test_what_is_no_folder(folder: Path) -> None:
    """Bug: an error that speaks of the names of repositories, or takes weights for a configuration."""
    for name in ("nothing", "model.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is no folder: give one that has a config.json"):
            moebius.from_pretrained(str(folder / name))


def test_loaded_in_inference_mode(folder: Path) -> None:
    """Bug: unpatching leaves tensors that only inference mode may use."""
    with torch.inference_mode():
        model = moebius.from_pretrained(str(folder), **EMULATED)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    moebius.unpatch(model)
    assert torch.equal(logits(model), expected)


def test_patched_and_unpatched_in_inference_mode() -> None:
    """Bug: the model cannot be trained afterwards."""
    model = zoo.build("qwen3_moe")
    with torch.inference_mode():
        moebius.unpatch(moebius.patch(model, **EMULATED))
    inputs = zoo.inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" in name)
