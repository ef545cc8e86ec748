"""Checkpoints that are damaged or incomplete: an error that names the file and the remedy, never other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moebius
from moebius.hf_plugin.checkpoints import converting
from tests import zoo
from tests.hf_plugin import helpers, quantized_checkpoints

INDEX = "model.safetensors.index.json"


def _of(folder: Path) -> dict[str, str]:
    shards: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return shards


def _write_index(folder: Path, shards: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def _without(folder: Path, end: str) -> None:
    name, shard = next((name, shard) for name, shard in _of(folder).items() if name.endswith(end))
    tensors = load_file(folder / shard)
    del tensors[name]
    save_file(tensors, folder / shard, {"format": "pt"})


def _absent_expert(folder: Path) -> None:
    _without(folder, "experts.3.up_proj.weight")


def _absent_norm(folder: Path) -> None:
    _without(folder, "layers.1.input_layernorm.weight")


def _named_but_nowhere(folder: Path) -> None:
    shards = _of(folder)
    _write_index(folder, shards | {"model.layers.0.mlp.experts.99.up_proj.weight": next(iter(shards.values()))})


def _not_named(folder: Path) -> None:
    shards = _of(folder)
    gone = next(shard for name, shard in shards.items() if name == "model.norm.weight")
    _write_index(folder, {name: shard for name, shard in shards.items() if shard != gone})
    (folder / gone).unlink()


def _missing_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _outside(folder: Path) -> None:
    _write_index(folder, _of(folder) | {"model.norm.weight": "../model.safetensors"})


def _no_json(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ')


def _no_map(folder: Path) -> None:
    _write_index(folder, ["model.safetensors"])


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_absent_expert, r"model-\d+-of-\d+\.safetensors has no model\..*experts\.3\.up_proj\.weight, which the index"),
    (_absent_norm, r"model-\d+-of-\d+\.safetensors has no model\.layers\.1\.input_layernorm\.weight, which the index"),
    (_named_but_nowhere, r"model-\d+-of-\d+\.safetensors has no .*experts\.99\.up_proj\.weight, which the index"),
    (_not_named, r"has no .*model\.norm\.weight.*incomplete"),
    (_missing_shard, r"model-00002-of-\d+\.safetensors is missing"),
    (_outside, r"index\.json names '\.\./model\.safetensors', which is no file beside it"),
    (_no_json, r"index\.json is no index of a checkpoint"),
    (_no_map, r"index\.json has no weight_map"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_index_and_shards_that_disagree(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """Catches weights that are filled at random with a warning only, and errors that name no file."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path, max_shard_size="100KB")
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("converted", [False, True])
def test_what_neither_index_nor_files_have_is_an_error_in_the_other_form_too(converted: bool, tmp_path: Path) -> None:
    """Catches a norm at its initial value, of which stock only warns."""
    model = zoo.build("qwen3_moe")
    model.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    folder = tmp_path / "stock"
    if converted:
        folder = converting.convert(folder, tmp_path / "converted")
    name = "model.layers.1.input_layernorm.weight"
    shards = _of(folder)
    tensors = load_file(folder / shards[name])
    del tensors[name]
    save_file(tensors, folder / shards.pop(name), {"format": "pt"})
    facts = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(facts | {"weight_map": shards}))
    with pytest.raises(ValueError, match=r"has no model\.layers\.1\.input_layernorm\.weight: it is incomplete.*again"):
        type(model).from_pretrained(folder, quantization_config=moebius.MoebiusConfig(device="cpu"))


def test_a_missing_shard_is_named_in_the_other_form_too(tmp_path: Path) -> None:
    """Catches checks that only `moebius.from_pretrained` makes."""
    model = zoo.build("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    _absent_norm(tmp_path)
    with pytest.raises(ValueError, match=r"which the index names.*again"):
        type(model).from_pretrained(tmp_path, quantization_config=moebius.MoebiusConfig(device="cpu"))


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn])
def test_a_type_that_the_model_does_not_have(kind: torch.dtype, tmp_path: Path) -> None:
    """Catches codes that are taken for weights: stock converts them to floats."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(32, 64).to(kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight in .*model\.safetensors is .*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


KINDS = ("bf16", "fp8", "mxfp4")


def written(kind: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A checkpoint of one file."""
    if kind == "mxfp4":
        quantized_checkpoints.write_mxfp4(folder, change)
    elif kind == "fp8":
        quantized_checkpoints.write("qwen3_moe", folder, "fp8", change)
    else:
        zoo.build("qwen3_moe").bfloat16().save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_short(kind: str, kept: int, tmp_path: Path) -> None:
    """In either form of loading; a mapping of it would end the process."""
    path = written(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors .*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_are_missing_or_damaged_are_named(kind: str, tmp_path: Path) -> None:
    """Catches an error of quantised checkpoints that names a weight, but not the file to fetch again."""
    path = written(kind, tmp_path)
    tensors = load_file(path)
    names = list(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    path.unlink()
    for shard, of_shard in halves.items():
        save_file({name: tensors[name] for name in of_shard}, tmp_path / shard, {"format": "pt"})
    shards = {name: shard for shard, of_shard in halves.items() for name in of_shard}
    _write_index(tmp_path, shards)
    moebius.from_pretrained(str(tmp_path), device="cpu")
    second = tmp_path / "model-2.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"model-2\.safetensors cannot be read as safetensors.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")
    second.unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors is missing, which .*index\.json names.*again"):
        moebius.from_pretrained(str(tmp_path), device="cpu")
    second.write_bytes(data)
    _write_index(tmp_path, shards | {"model.layers.0.mlp.experts.nothing": "model-2.safetensors"})
    with pytest.raises(
        ValueError, match=r"model-2\.safetensors has no .*experts\.nothing, which the index names.*again"
    ):
        moebius.from_pretrained(str(tmp_path), device="cpu")


FP8, MXFP4 = "model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.down_proj_blocks"


def _fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name in (FP8, MXFP4):
        if name in tensors:
            tensors[name] = tensors[name][..., :-1, :].clone()


def _other_matrix(tensors: dict[str, torch.Tensor]) -> None:
    """Of the transposed shape, whose scales belong to it."""
    for name in (FP8, f"{FP8}_scale_inv"):
        if name in tensors:
            tensors[name] = tensors[name].T.contiguous()
    for end in ("blocks", "scales"):
        if (name := f"{MXFP4.removesuffix('blocks')}{end}") in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name]], 1)


def _signed(tensors: dict[str, torch.Tensor]) -> None:
    for name in (FP8, MXFP4):
        if name in tensors:
            tensors[name] = tensors[name].view(torch.int8)


@pytest.mark.parametrize("change", [_fewer_rows, _other_matrix, _signed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_codes_of_a_wrong_shape_or_type(kind: str, change: Callable[..., None], tmp_path: Path) -> None:
    """Catches codes that are read as other weights."""
    written(kind, tmp_path, change)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*(model\.safetensors|again)"):
        moebius.from_pretrained(str(tmp_path), device="cpu")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """In either form of loading, also where transformers would take it."""
    path = written("bf16", tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    with pytest.raises(OSError, match="safetensors"):
        moebius.from_pretrained(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is no safetensors file.*save_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=moebius.MoebiusConfig(device="cpu"))


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bytes, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    path = written(request.param, folder)
    model = moebius.from_pretrained(str(folder), device="cpu")
    moebius.unpatch(model)
    return folder, path.read_bytes(), helpers.weights(model)  # copies: stock maps the file, which is overwritten


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_damaged_headers(whole: tuple[Path, bytes, dict[str, torch.Tensor]], data: st.DataObject) -> None:
    """Catches a crash, and a model of other weights: one byte of the header, or its length, or the file's, is wrong."""
    folder, original, weights = whole
    path, damaged = folder / "model.safetensors", bytearray(original)
    end = 8 + int.from_bytes(original[:8], "little")
    where = data.draw(st.integers(0, 7) | st.integers(8, end - 1), "byte")
    damaged[where] = data.draw(st.integers(0, 255).filter(lambda value: value != original[where]), "value")
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(original), len(original) - 1, end - 1, 5, 0]), "size")])
    problem = ""
    try:
        model = moebius.from_pretrained(str(folder), device="cpu")
    except ValueError as error:
        problem = str(error)
    if problem:
        assert str(folder) in problem
        assert "again" in problem
        return
    moebius.unpatch(model)  # spaces and the metadata may be damaged without harm
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
