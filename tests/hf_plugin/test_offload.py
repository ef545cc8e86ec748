"""Models that accelerate offloads, as `device_map="auto"` leaves them: patched, nothing is copied to and fro."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, attach_align_device_hook_on_blocks, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, everywhere, greedy, logits, patched, prompt

CPU = torch.device("cpu")
BLOCKS = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]


def whole(model: PreTrainedModel) -> None:
    """Every module offloaded; here the GPU is the CPU."""
    cpu_offload(model, execution_device=CPU)


def half(model: PreTrainedModel, room: int = 3) -> None:
    """What `dispatch_model` does with a GPU that has room for so many blocks, by default for the first layer."""
    away = {name: name in BLOCKS[room:] for name in BLOCKS}
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(BLOCKS[room:]))}
    attach_align_device_hook_on_blocks(
        model,
        {**dict.fromkeys(BLOCKS, CPU), "": CPU},
        away,
        weights_map=OffloadedWeightsLoader(state_dict=state),
        tied_params_map={model.lm_head.weight.data_ptr(): {}},
    )


ways = pytest.mark.parametrize("offload", [whole, half])


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


@ways
@everywhere
def test_results_and_the_way_back(offload: Callable[[PreTrainedModel], None], options: dict[str, object]) -> None:
    """Catches values lost on either way, a rest that is still copied in every call, and experts held twice."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want, tokens = logits(model, ids), greedy(model, ids)
    offload(model)
    away = on_meta(model)
    assert any("experts" in name for name in away)
    kept = next(h for m in model.modules() if getattr(h := getattr(m, "_hf_hook", None), "weights_map", None))
    stored = kept.weights_map.dataset
    stored = getattr(stored, "state_dict", stored)
    for _ in range(2):
        with patched(model, **options):
            assert_close(logits(model, ids), want)
            assert greedy(model, ids) == tokens
            assert all("experts" in name for name in on_meta(model))
            assert not any("experts" in name for name in stored)
        assert on_meta(model) == away
        assert greedy(model, ids) == tokens
        assert torch.equal(logits(model, ids), want)
    remove_hook_from_module(model, recurse=True)
    helpers.assert_same_weights(model, before)


@ways
def test_save_and_copy(offload: Callable[[PreTrainedModel], None], tmp_path: Path) -> None:
    """Catches a checkpoint with what stands for weights, and a copy that runs, or is restored to, the original."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    offload(model)
    with patched(model, device="emulated", gpu_memory=0.5):
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
    assert_close(logits(twin, ids), want)
    moebius.unpatch(twin)
    assert on_meta(twin) == on_meta(model)
    assert torch.equal(logits(twin, ids), want)
    helpers.assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), before)


@pytest.mark.parametrize("room", [3, 0])
def test_tied_weights_share_memory_on_the_device(room: int) -> None:
    """Catches embeddings that take their memory twice where the head has the same, and keep it after the way back."""
    model = zoo.build("qwen3_moe")
    model.lm_head.weight = model.model.embed_tokens.weight
    ids = prompt(model)
    want = logits(model, ids)
    half(model, room)
    tied = model.lm_head._hf_hook.tied_params_map
    before = {pointer: len(places) for pointer, places in tied.items()}
    with patched(model, device="cpu"):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert_close(logits(model, ids), want)
    assert {pointer: len(places) for pointer, places in tied.items()} == before
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_patch_that_fails_leaves_the_hooks_at_work(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model whose weights stay where they were brought, and hooks that no longer load them."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    half(model)
    away = on_meta(model)

    def fail(*args: object) -> None:
        raise MemoryError("no room, says the test")

    monkeypatch.setattr("moebius.hf_plugin.patching." + ("find_sites" if when == "early" else "saving.install"), fail)
    with pytest.raises(MemoryError, match="no room"):
        moebius.patch(model, device="emulated")
    assert on_meta(model) == away
    assert all(
        m._hf_hook.offload
        for m in model.modules()
        if type(getattr(m, "_hf_hook", None)) is AlignDevicesHook and m._hf_hook.weights_map
    )
    assert torch.equal(logits(model, ids), want)


def test_experts_on_disk_are_refused(tmp_path: Path) -> None:
    """Catches all experts brought into memory that may not have room for them."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    disk_offload(model, tmp_path, execution_device=CPU)
    away = on_meta(model)
    with pytest.raises(
        ValueError, match=r"has offloaded 'model\.embed_tokens\.weight' to disk .*moebius\.from_pretrained"
    ):
        moebius.patch(model, device="cpu")
    assert not moebius.is_patched(model)
    assert on_meta(model) == away
    assert torch.equal(logits(model, ids), want)
