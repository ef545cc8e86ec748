"""Loading straight into the patched state: same weights, low peak, clear refusals."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm._monitor import TMonitor
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist
from transformers.utils import logging

import moebius
from tests import zoo
from tests.conftest import RunPython
from tests.hf_plugin.peak_memory import LAYER_BYTES, LAYERS, WATCH, needs_linux, save_large

ROOT = Path(__file__).parents[2]

# per-expert tensors, packed, packed transposed and interleaved with biases, flat, with identity experts, other names
LAYOUTS = ("qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "longcat_flash", "mixtral", "nemotron_h")


def saved(name: str, folder: Path, **kwargs: object) -> PreTrainedModel:
    """The stock model of a zoo entry, as loaded from `folder`, where it was saved."""
    model = zoo.build(name)
    model.save_pretrained(folder, **kwargs)
    return type(model).from_pretrained(folder)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**zoo.inputs(model)).logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_streamed_weights_are_the_checkpoints(name: str, tmp_path: Path) -> None:
    """Both forms of loading give stock's logits, and unpatching gives stock's weights bit for bit."""
    stock = saved(name, tmp_path, max_shard_size="100KB")
    expected = logits(stock)
    streamed = moebius.from_pretrained(str(tmp_path), device="emulated", gpu_memory=0.5)
    config = moebius.MoebiusConfig(device="cpu")
    by_config = type(stock).from_pretrained(tmp_path, quantization_config=config)
    for model in (streamed, by_config):
        assert type(model) is type(stock)
        assert moebius.is_patched(model)
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert model.config.to_dict() == stock.config.to_dict()
        moebius.unpatch(model)
        restored, original = model.state_dict(), stock.state_dict()
        assert list(restored) == list(original)
        assert all(torch.equal(restored[key], original[key]) for key in original)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streamed_experts_run_where_patched_ones_do(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches activations not recognised, and so slow torch code, where a checkpoint's dtype is torch's default."""
    stock = zoo.build(name).to(dtype)
    stock.save_pretrained(tmp_path)
    moebius.patch(stock, device="cpu")
    streamed = moebius.from_pretrained(str(tmp_path), device="cpu", dtype="auto")
    config = moebius.MoebiusConfig(device="cpu")
    by_config = type(stock).from_pretrained(tmp_path, dtype="auto", quantization_config=config)
    for model in (streamed, by_config):
        assert [n for n in moebius.stats(model).notes if "checkpoint's files" not in n] == moebius.stats(stock).notes
        moebius.unpatch(model)
    moebius.unpatch(stock)


def test_single_experts_are_not_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a per-expert checkpoint that is packed first, which costs a copy and a layer's memory."""
    saved("qwen3_moe", tmp_path)
    monkeypatch.setattr(MergeModulelist, "convert", lambda *_, **__: pytest.fail("stacked"))
    moebius.from_pretrained(str(tmp_path), device="cpu")


def test_tied_experts_share_one_store(tmp_path: Path) -> None:
    """The checkpoint holds the experts of two modules once; both compute with them, and unpatch ties them again."""
    stock = saved("diffusion_gemma", tmp_path)
    model = moebius.from_pretrained(str(tmp_path), device="cpu")
    bytes_of_all = sum(p.nbytes for name, p in stock.named_parameters() if ".experts." in name)
    assert moebius.stats(model).expert_bytes == bytes_of_all
    moebius.unpatch(model)
    restored, original = model.state_dict(), stock.state_dict()
    assert list(restored) == list(original)
    assert all(torch.equal(restored[key], original[key]) for key in original)
    assert model.num_parameters() == stock.num_parameters()


def test_progress_is_shown_in_bytes_and_leaves_no_thread(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """tqdm would start a thread that watches its bars, and that stays."""
    stock = saved("qwen3_moe", tmp_path)
    nbytes = sum(p.nbytes for name, p in stock.named_parameters() if ".experts." in name)
    assert nbytes == 393216
    logging.enable_progress_bar()  # the command line hides it for the whole process
    threads = set(threading.enumerate())
    model = moebius.from_pretrained(str(tmp_path), device="cpu")
    assert "393k/393k" in capfd.readouterr().err
    moebius.unpatch(model)
    assert {type(thread) for thread in set(threading.enumerate()) - threads} <= {TMonitor}, "not stock's own"


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_of_one_place_works(device_map: object, tmp_path: Path) -> None:
    stock = saved("qwen3_moe", tmp_path)
    model = moebius.from_pretrained(str(tmp_path), device="cpu", device_map=device_map)
    assert torch.allclose(logits(model), logits(stock), atol=1e-5)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize("other", ["disk", "cpu"])
def test_a_device_map_that_offloads_is_refused(other: str, tmp_path: Path) -> None:
    """Catches hooks of accelerate that copy experts on every call."""
    saved("qwen3_moe", tmp_path)
    places = {"model.embed_tokens": 0, "model.layers": other, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    with pytest.raises(ValueError, match=rf"device_map puts modules on .*{other}.*device_map='cuda:0'"):
        moebius.from_pretrained(str(tmp_path), device="cpu", device_map=places)


def test_saving_a_streamed_model_loses_nothing(tmp_path: Path) -> None:
    """Experts that never were parameters must be in the checkpoint nevertheless, as stock writes it."""
    stock = saved("qwen3_moe", tmp_path / "a")
    model = moebius.from_pretrained(str(tmp_path / "a"), device="cpu")
    model.save_pretrained(tmp_path / "b")
    written, original = (load_file(tmp_path / folder / "model.safetensors") for folder in "ba")
    assert list(written) == list(original)
    assert all(torch.equal(written[key], original[key]) for key in original)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ba"]
    assert configs[0] == configs[1]
    assert torch.equal(logits(type(stock).from_pretrained(tmp_path / "b")), logits(stock))


def test_lossy_format_computes_what_it_holds_and_cannot_be_unpatched(tmp_path: Path) -> None:
    """bf16 experts of an fp32 checkpoint: the rounded values are used, and unpatch does not pretend otherwise."""
    saved("qwen3_moe", tmp_path)
    rounded = zoo.build("qwen3_moe")
    for name, parameter in rounded.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.bfloat16().float()
    model = moebius.from_pretrained(str(tmp_path), device="cpu", expert_format="bf16")
    expected = logits(rounded)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="load the checkpoint again"):
        moebius.unpatch(model)
    assert moebius.is_patched(model)


def test_missing_experts_are_an_error(tmp_path: Path) -> None:
    """Stock transformers initialises what is missing at random, with a warning only."""
    saved("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(path).items() if ".layers.1.mlp.experts." not in key}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no down_proj, gate_up_proj for 'model\.layers\.1\.mlp\.experts'"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_checkpoint_of_another_shape_is_an_error(tmp_path: Path) -> None:
    """One expert less than config.json says must not leave a record unfilled."""
    saved("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(path).items() if ".experts.7." not in key}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_truncated_shard_is_an_error(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"cannot be read as safetensors.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_quantised_and_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    """A quantised checkpoint needs its own reader; a pickle is never opened."""
    saved("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="bitsandbytes"):
        moebius.from_pretrained(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_bad_options_and_dense_models_are_refused(tmp_path: Path) -> None:
    """Before anything is read."""
    saved("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match="gpu_memory"):
        moebius.from_pretrained(str(tmp_path), device="emulated", gpu_memory=10)
    with pytest.raises(ValueError, match="keep_original"):
        moebius.MoebiusConfig(keep_original=True)
    with pytest.raises(TypeError, match="gpu_memroy"):
        moebius.MoebiusConfig(gpu_memroy="1GiB")


PEAK = (
    WATCH
    + """
from moebius.hf_plugin.checkpoints import in_place
before = anonymous()
watcher.start()
kind, folder = os.environ["KIND"], os.environ["FOLDER"]
if kind != "patched":
    in_place.slow_to_map = lambda files: None if kind == "mapped" else "copied"
    model = moebius.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    start, peak = anonymous(), 0
    moebius.patch(model, device="cpu")
running = False; watcher.join()
print(peak - before)
"""
)


@pytest.mark.slow
@needs_linux
def test_peak_memory(tmp_path: Path, run_python: RunPython) -> None:
    """Loading must not hold experts twice, and of mapped ones nothing; patching holds one layer's twice. 403 MB."""
    save_large(tmp_path)
    experts = LAYERS * LAYER_BYTES
    peaks = {
        kind: int(run_python(PEAK, cwd=tmp_path, path=(ROOT,), KIND=kind, FOLDER=str(tmp_path)).stdout)
        for kind in ("mapped", "streamed", "patched")
    }
    layer, slack = LAYER_BYTES, 250 << 20  # imports and compiled kernels; a second copy of all experts is 403 MB
    assert peaks["mapped"] < slack, peaks
    assert experts * 0.9 < peaks["streamed"] < experts + layer + slack, peaks
    assert experts * 0.9 < peaks["patched"] < experts + 2 * layer + slack, peaks
