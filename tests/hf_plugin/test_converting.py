"""Converted checkpoints: the same model by mapping, back to stock bit for bit, and no model at all without Moebius."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import moebius
from moebius.hf_plugin.checkpoints import converting
from moebius.hf_plugin.cli.app import app
from moebius.hf_plugin.running.expert_files import EXPERTS
from tests import zoo
from tests.hf_plugin import helpers, quantized_checkpoints
from tests.hf_plugin.helpers import TRAINED, assert_close, prompt

# per-expert tensors, packed, transposed with biases, flat, with surplus rows, other names, tied
LAYOUTS = ("qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "longcat_flash", "mixtral", "diffusion_gemma", "qwen3_vl_moe")

PLACES: tuple[dict[str, Any], ...] = (
    {"device": "cpu"}, {"device": "emulated", "gpu_memory": 0.5}, {"device": "cpu", "cpu_memory": 0.4},
)  # fmt: skip


def saved(name: str, folder: Path, **kwargs: Any) -> PreTrainedModel:
    model = zoo.build(name)
    model.save_pretrained(folder, **kwargs)
    return type(model).from_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """The converted checkpoint has the weights of the original, and becomes it again."""
    stock = saved(name, tmp_path / "stock", max_shard_size="100KB")
    converting.convert(tmp_path / "stock", tmp_path / "converted")
    model = moebius.from_pretrained(str(tmp_path / "converted"), device="cpu")
    assert type(model) is type(stock)
    assert model.config.to_dict() | {"_name_or_path": 0} == stock.config.to_dict() | {"_name_or_path": 0}
    helpers.assert_same_weights(model, helpers.weights(stock))
    moebius.unpatch(model)
    helpers.assert_same_weights(model, helpers.weights(stock))
    converting.to_stock(tmp_path / "converted", tmp_path / "back")
    written, original = weights(tmp_path / "back"), weights(tmp_path / "stock")
    assert sorted(written) == sorted(original)
    assert all(torch.equal(written[key], original[key]) for key in original)


@pytest.mark.parametrize("options", PLACES)
@pytest.mark.parametrize("format", ["native", "int8"])
def test_both_forms_of_loading_compute_the_same(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    """From the file as from the original, in either form, with any placement."""
    saved("qwen3_moe", tmp_path / "stock")
    converting.convert(tmp_path / "stock", tmp_path / "converted", format)
    want = moebius.from_pretrained(str(tmp_path / "stock"), device="cpu", expert_format=format)
    ids = prompt(want)
    ours = moebius.from_pretrained(str(tmp_path / "converted"), **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", quantization_config=moebius.MoebiusConfig(**options)
    )
    for model in (ours, theirs):
        assert (helpers.logits(model, ids) - helpers.logits(want, ids)).abs().max() < 1e-2
        if options["device"] == "cpu":
            assert_close(helpers.logits(model, ids), helpers.logits(want, ids))
        assert (moebius.stats(model).sums.disk_reads > 0) == ("cpu_memory" in options)


def test_without_moebius_it_is_an_error(tmp_path: Path) -> None:
    """Stock initialises missing weights at random, with a warning only."""
    saved("qwen3_moe", tmp_path / "stock")
    converting.convert(tmp_path / "stock", tmp_path / "converted")
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "converted")


def test_tokenizer_and_command(tmp_path: Path) -> None:
    """The command converts, checks and turns back, and all that belongs to the model comes along."""
    run = CliRunner()
    folder = str(tmp_path / "converted")
    assert run.invoke(app, ["convert", str(TRAINED), folder, "--format", "int4"]).exit_code == 0
    names = {path.name for path in TRAINED.iterdir()} - {"model.safetensors"}
    assert names < {path.name for path in Path(folder).iterdir()}
    assert AutoTokenizer.from_pretrained(folder).encode("Alice") == helpers.tokenizer().encode("Alice")
    checked = run.invoke(app, ["convert", folder, "--check"])
    assert checked.exit_code == 0
    assert "all as they were written" in checked.stdout
    assert run.invoke(app, ["convert", folder, str(tmp_path / "back"), "--to-stock"]).exit_code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = torch.arange(12)[None]
    mapped = moebius.from_pretrained(folder, device="cpu")
    error = (helpers.logits(stock, ids) - helpers.logits(mapped, ids)).abs().max()
    assert error < 0.05 * helpers.logits(stock, ids).abs().max()


def test_bad_arguments(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "stock")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists and is not an empty folder"):
        converting.convert(tmp_path / "stock", tmp_path / "full")
    with pytest.raises(ValueError, match="is not a converted checkpoint"):
        converting.to_stock(tmp_path / "stock", tmp_path / "back")
    converting.convert(tmp_path / "stock", tmp_path / "converted", "int8")
    with pytest.raises(ValueError, match=r"holds experts in int8, not in 'bf16'.*convert the original"):
        moebius.from_pretrained(str(tmp_path / "converted"), device="cpu", expert_format="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "full", "stock"]


def test_into_a_folder_by_a_link(tmp_path: Path) -> None:
    """Bug: all is written, and then the folder cannot take the link's name."""
    saved("qwen3_moe", tmp_path / "stock")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    converting.convert(tmp_path / "stock", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert converting.check(tmp_path / "folder") > 0
    with pytest.raises(ValueError, match="nothing is neither a folder nor a repository"):
        converting.convert(tmp_path / "nothing", tmp_path / "other")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    """A shard that ends too early, and a checkpoint without some experts."""
    saved("qwen3_moe", tmp_path / "stock")
    path = tmp_path / "stock" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|invalid|header"):
        converting.convert(tmp_path / "stock", tmp_path / "converted")
    assert [file.name for file in tmp_path.iterdir()] == ["stock"]


def test_records_of_another_model_are_refused(tmp_path: Path) -> None:
    """Files mixed from two folders, or damaged: never a model with wrong weights."""
    for name in ("qwen3_moe", "mixtral"):
        saved(name, tmp_path / name)
        converting.convert(tmp_path / name, tmp_path / f"{name}-converted")
    target = tmp_path / "qwen3_moe-converted" / EXPERTS
    good = target.read_bytes()
    target.unlink()
    target.write_bytes((tmp_path / "mixtral-converted" / EXPERTS).read_bytes())
    with pytest.raises(ValueError, match=r"belongs to another checkpoint|holds .* where the model's configuration"):
        moebius.from_pretrained(str(target.parent), device="cpu")
    target.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=rf"{EXPERTS} is damaged"):
        moebius.from_pretrained(str(target.parent), device="cpu")
    damaged = bytearray(good)
    damaged[5000] ^= 1
    target.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is damaged: expert 0 of model\.layers\.0"):
        converting.check(target.parent)
    damage = rf"{EXPERTS} is damaged: expert 0 of model\.layers\.0.* delete it and convert"
    for options in PLACES:  # with cpu_memory, what is computed on the CPU is checked when it is read
        with pytest.raises(ValueError, match=damage):
            helpers.logits(moebius.from_pretrained(str(target.parent), **options), torch.arange(32)[None])
    target.unlink()
    with pytest.raises(ValueError, match="checkpoint"):
        moebius.from_pretrained(str(target.parent), device="cpu")


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_changes_while_it_is_mapped(cut: bool, tmp_path: Path) -> None:
    """Catches weights that change under a model, and a process that ends with SIGBUS where they are gone."""
    saved("qwen3_moe", tmp_path / "stock")
    converting.convert(tmp_path / "stock", tmp_path / "converted")
    model = moebius.from_pretrained(str(tmp_path / "converted"), device="cpu")
    ids, path = prompt(model), tmp_path / "converted" / EXPERTS
    want = helpers.logits(model, ids)
    path.chmod(0o644)
    if cut:
        os.truncate(path, 8192)
    else:
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"other")
    with pytest.raises(ValueError, match=rf"{EXPERTS} was changed while it was in use"):
        helpers.logits(model, ids)
    path.unlink()
    converting.convert(tmp_path / "stock", tmp_path / "again")
    model = moebius.from_pretrained(str(tmp_path / "again"), device="cpu")
    os.replace(tmp_path / "again" / EXPERTS, path)  # a file that is replaced stays what it was for who has it
    assert torch.equal(helpers.logits(model, ids), want)


KILLED = """
import os, sys
from moebius.cpu_experts.record_writer import RecordWriter
from moebius.hf_plugin.checkpoints import converting
RecordWriter.write = lambda *_: os.kill(os.getpid(), 9)
converting.convert(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Its folder has no name that is asked for, and the next conversion removes it, but none that is under way."""
    saved("qwen3_moe", tmp_path / "stock")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "stock"), str(tmp_path / "converted")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / "converted").exists()
    with converting._new_folder(tmp_path / "converted") as under_way:
        converting.convert(tmp_path / "stock", tmp_path / "converted")
        assert under_way.exists()
        shutil.rmtree(tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "stock"]


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantised_checkpoint(method: str, tmp_path: Path) -> None:
    """Its codes are kept in the file, and the way back gives the weights of the dequantised load, bit for bit."""
    if method == "fp8":
        quantized_checkpoints.write("qwen3_moe", tmp_path / "coded", "fp8")
    else:
        quantized_checkpoints.write_mxfp4(tmp_path / "coded")
    direct = moebius.from_pretrained(str(tmp_path / "coded"), device="cpu")
    converting.convert(tmp_path / "coded", tmp_path / "converted")
    mapped = moebius.from_pretrained(str(tmp_path / "converted"), device="cpu")
    formats = [
        {module._moebius.held.layout.format for module in helpers.experts_modules(model)} for model in (direct, mapped)
    ]
    assert formats[0] == formats[1] == {"e4m3-32x32-fp32" if method == "fp8" else "mxfp4"}
    ids = prompt(direct)
    assert torch.equal(helpers.logits(mapped, ids), helpers.logits(direct, ids))
    converting.to_stock(tmp_path / "converted", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    moebius.unpatch(direct)
    helpers.assert_same_weights(back, helpers.weights(direct))
