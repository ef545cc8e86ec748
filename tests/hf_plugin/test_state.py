"""The state of a patched model: saved, counted, copied and converted as if it were stock."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EMULATED, assert_close, assert_same_weights, everywhere, logits, patched, prompt

# one whose checkpoint has an entry per expert, an interleaved one with biases, one that packs in another order
SAVED = ("qwen3_moe", "gpt_oss", "dbrx")


@everywhere
@pytest.mark.parametrize("name", SAVED)
def test_save_pretrained_loses_nothing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Catches a checkpoint without experts, the worst bug this project can have, or one that stock reads otherwise."""
    model = zoo.build(name)
    ids = prompt(model)
    want, state = logits(model, ids), helpers.weights(model)
    model.save_pretrained(tmp_path / "stock")
    with patched(model, **options):
        logits(model, ids)
        model.save_pretrained(tmp_path / "patched")

    stock, saved = (load_file(tmp_path / side / "model.safetensors") for side in ("stock", "patched"))
    assert list(saved) == list(stock)
    assert [key for key in stock if not helpers.same_bits(saved[key], stock[key])] == []
    for file in ("config.json", "generation_config.json"):
        texts = [json.loads((tmp_path / side / file).read_text()) for side in ("stock", "patched")]
        assert texts[0] == texts[1]
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == sorted(
        p.name for p in (tmp_path / "stock").iterdir()
    )
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not any(problems.values()), problems
    assert_same_weights(loaded, state)
    assert torch.equal(logits(loaded.eval(), ids), want)


def test_save_pretrained_in_shards(tmp_path: Path) -> None:
    """Catches an index or shard that is planned without the experts' bytes."""
    model = zoo.build("qwen3_moe")
    state = helpers.weights(model)
    with patched(model, **EMULATED):
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), state)


@everywhere
def test_state_dict_and_counts(options: dict[str, Any]) -> None:
    """Catches a state dict without experts, on meta, in another order, or aliasing memory that is about to change."""
    model = zoo.build("gpt_oss")
    before, counts = helpers.weights(model), _counts(model)
    with patched(model, **options):
        assert_same_weights(model, before)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
        assert _counts(model) == counts
        for tensor in model.state_dict().values():
            assert not tensor.requires_grad
        [experts, *_] = helpers.experts_modules(model)
        assert list(experts.state_dict()) == list(experts._parameters)
        experts.state_dict()["down_proj"].zero_()
        assert_same_weights(model, before)
    assert_same_weights(model, before)


def _counts(model: PreTrainedModel) -> Any:
    return model.num_parameters(), model.num_parameters(only_trainable=True), model.get_memory_footprint()


def test_trainable_flags_survive() -> None:
    """Catches unpatch that restores requires_grad as it was at patch time, over a later freeze."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="cpu"):
        model.requires_grad_(False)
        assert model.num_parameters(only_trainable=True) == 0
    assert not any(p.requires_grad for p in model.parameters())


# ---- copies


@everywhere
def test_deepcopy_works_and_is_independent(options: dict[str, Any]) -> None:
    """Catches a copy that shares threads, cache or statistics with its original, or that holds no experts."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    moebius.patch(model, **options)
    twin = copy.deepcopy(model)
    assert moebius.is_patched(twin)
    assert_same_weights(twin, before)

    assert_close(logits(twin, ids), want)
    assert moebius.stats(model).to_dict()["tokens"] == 0
    assert moebius.stats(twin).to_dict()["tokens"] == ids.numel()
    moebius.unpatch(model)
    assert_close(logits(twin, ids), want)
    assert torch.equal(logits(model, ids), want)

    moebius.unpatch(twin)
    assert_same_weights(twin, before)
    with torch.no_grad():
        twin.model.layers[0].mlp.experts.down_proj.zero_()
    assert_same_weights(model, before)
    assert torch.equal(logits(model, ids), want)


@everywhere
def test_the_copy_outlives_its_original(options: dict[str, Any]) -> None:
    """Catches a copy that borrows what the original frees."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    twin = copy.deepcopy(moebius.patch(model, **options))
    del model
    assert_close(logits(twin, ids), want)
    assert_close(logits(copy.deepcopy(twin), ids), want)
    moebius.unpatch(twin)
    assert_same_weights(twin, before)


def test_a_copy_has_its_own_norms() -> None:
    """Catches a copy whose experts go on using modules of the original, as norms on each expert's output."""
    model = zoo.build("muse_spark")
    ids = prompt(model)
    want = logits(model, ids)
    twin = copy.deepcopy(moebius.patch(model, device="cpu"))
    with torch.no_grad():
        for experts in helpers.experts_modules(model):
            for parameter in experts.post_expert_norm.parameters():
                parameter.mul_(3)
    assert_close(logits(twin, ids), want)
    assert (logits(model, ids) - want).abs().max() > 1e-3 * want.abs().max()


def test_copy_with_kept_originals() -> None:
    """Catches a copy of a lossy model that unpatches to the lossy weights."""
    model = zoo.build("qwen3_moe")
    before = helpers.weights(model)
    twin = copy.deepcopy(moebius.patch(model, device="cpu", expert_format="bf16", keep_original=True))
    for patched_model in (model, twin):
        moebius.unpatch(patched_model)
        assert_same_weights(patched_model, before)


# ---- conversions

CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "to-device-and-dtype": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float": lambda model: model.float(),
    "there-and-back": lambda model: model.half().float(),
}


@everywhere
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_dtype_conversion_is_that_of_stock(convert: Callable[[nn.Module], Any], options: dict[str, Any]) -> None:
    """Catches experts that stay in the old dtype, in the store or in the cache, and unpatch to another than stock."""
    stock, model = zoo.build("gpt_oss"), zoo.build("gpt_oss")
    ids = prompt(model, 1, 6)
    with patched(model, **options):
        logits(model, ids)  # fills the cache with the old weights
        assert convert(model) is not None
        convert(stock)
        assert_same_weights(model, helpers.weights(stock))
        moebius.reset_stats(model)
        for _ in range(3):
            got = logits(model, ids)
        assert (moebius.stats(model).sums.hits > 0) == (options["device"] != "cpu"), "the cache was not opened again"
        want = logits(stock, ids)
        precise = logits(copy.deepcopy(stock).float(), ids)
        assert got.dtype == want.dtype
        allowed = 2 * (want.float() - precise).abs().max() + 1e-3 * precise.abs().max()
        assert (got.float() - precise).abs().max() <= allowed
    assert_same_weights(model, helpers.weights(stock))
    assert torch.equal(logits(model, ids), want)


@everywhere
def test_impossible_dtype_raises_and_is_undone_by_the_way_back(options: dict[str, Any]) -> None:
    """Catches experts that silently stay in float32 in a model that is float64 otherwise."""
    model = zoo.build("qwen3_moe")
    before = helpers.weights(model)
    with patched(model, **options):
        with pytest.raises(RuntimeError, match=r"cannot become torch\.float64: unpatch the model, convert it"):
            model.double()
        model.float()
        assert_same_weights(model, before)
        logits(model, prompt(model))
    assert_same_weights(model, before)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "lossless"])
def test_dtype_conversion_of_experts_stored_in_another_format(keep: bool) -> None:
    """Catches a conversion that makes a lossy store the only copy, or that a store of another dtype breaks."""
    stock, model = zoo.build("qwen3_moe"), zoo.build("qwen3_moe")
    if not keep:  # weights that bfloat16 holds exactly
        stock, model = stock.bfloat16().float(), model.bfloat16().float()
    ids = prompt(model)
    with patched(model, device="cpu", expert_format="bf16", keep_original=keep):
        model.half()
        assert_same_weights(model, helpers.weights(stock.half()))
        assert logits(model, ids).dtype == torch.float16
        model.float()
        assert_same_weights(model, helpers.weights(stock.float()))
        logits(model, ids)
    assert_same_weights(model, helpers.weights(stock))


@everywhere
def test_moving_to_meta_raises(options: dict[str, Any]) -> None:
    """Catches a move to meta that would leave the experts behind in host memory, unnoticed."""
    model = zoo.build("qwen3_moe")
    with patched(model, **options), pytest.raises(RuntimeError, match="meta device: unpatch it first"):
        model.to("meta")


@everywhere
def test_moving_to_where_it_is(options: dict[str, Any]) -> None:
    """Catches `to` and `share_memory` that fail on the experts' placeholders or drop them."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with patched(model, **options):
        model.to("cpu").cpu().share_memory()
        assert_same_weights(model, before)
        assert_close(logits(model, ids), want)
    assert_same_weights(model, before)


def test_tied_experts_convert_together() -> None:
    """Each of two tied modules would else get a store and placeholders of its own."""
    model = zoo.build("diffusion_gemma")
    count = model.num_parameters()
    moebius.patch(model, device="cpu")
    before = moebius.stats(model).expert_bytes
    model.bfloat16()
    assert model.num_parameters() == count
    assert moebius.stats(model).expert_bytes == before // 2
    moebius.unpatch(model)
    assert model.num_parameters() == count
    expected = zoo.build("diffusion_gemma").bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
