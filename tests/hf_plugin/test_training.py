"""What cannot work on patched experts raises an error that says so, and is never ignored."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, everywhere, logits, patched, prompt, unchanged

REMEDY = r"moebius\.unpatch\(model\)"


@everywhere
def test_backward_raises_and_forward_does_not(options: dict[str, Any]) -> None:
    """Catches gradients that silently lack the experts' part, and a forward that needs no_grad."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    with patched(model, **options):
        output = model(input_ids=ids, labels=ids)
        assert output.logits.requires_grad
        assert_close(output.logits.detach(), want)
        with pytest.raises(RuntimeError, match=f"computes no gradients.*{REMEDY}"):
            output.loss.backward()
        assert_close(logits(model, ids), want)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" in name)


@everywhere
def test_backward_raises_for_a_frozen_model_with_an_adapter(options: dict[str, Any]) -> None:
    """Catches training of an adapter on attention below patched experts: part of its gradient passes through them."""
    from peft import LoraConfig, get_peft_model

    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    with patched(model, **options):
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        with pytest.raises(RuntimeError, match=REMEDY):
            wrapped(input_ids=ids, labels=ids).loss.backward()


@everywhere
def test_layers_above_the_experts_still_train(options: dict[str, Any]) -> None:
    """Catches an error where no gradient passes through experts: the head of a frozen model can be trained."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()
    want, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    with patched(model, **options):
        model(input_ids=ids, labels=ids).loss.backward()
    assert_close(model.lm_head.weight.grad, want)


@everywhere
def test_training_mode_routes_without_prediction(options: dict[str, Any]) -> None:
    """Catches a predictor that draws random numbers of a router in training, and a forward that needs eval mode."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    want = logits(model, ids)
    with patched(model, **options, predictor="next_gate"):
        logits(model, ids)
        moebius.reset_stats(model)
        assert_close(logits(model.train(), ids), want)
        assert moebius.stats(model).to_dict()["predicted"] == 0
    model.eval()


# ---- adapters on the experts themselves


def _adapt_experts(model: PreTrainedModel, *names: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], target_parameters=list(names), r=2, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("names", [("mlp.experts.down_proj",), ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")])
@everywhere
def test_lora_on_experts_before_patching_is_refused(names: tuple[str, ...], options: dict[str, Any]) -> None:
    """Catches an adapter that the patched experts would ignore; once merged, it counts."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    plain = logits(model, ids)
    wrapped = _adapt_experts(model, *names)
    want = logits(wrapped, ids)
    assert (want - plain).abs().max() > 1e-2 * plain.abs().max()
    for target in (wrapped, model):
        with unchanged(target), pytest.raises(ValueError, match=r"carries an adapter .*merge_and_unload"):
            moebius.patch(target, **options)
    assert torch.equal(logits(wrapped, ids), want)
    merged = wrapped.merge_and_unload()
    want = logits(merged, ids)
    with patched(merged, **options):
        assert_close(logits(merged, ids), want)


@everywhere
def test_lora_on_experts_after_patching_is_refused(options: dict[str, Any]) -> None:
    """Catches an adapter without effect, and one whose weights peft makes on the meta device of a placeholder."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with patched(model, **options):
        with pytest.raises(RuntimeError, match=r"adapter was put on the patched expert weights .* unpatch"):
            _adapt_experts(model, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        layers = model.model.layers  # peft adapts attention first; give it its modules back
        for layer in layers:
            layer.self_attn.q_proj = getattr(layer.self_attn.q_proj, "base_layer", layer.self_attn.q_proj)
        assert_close(logits(model, ids), want)
    helpers.assert_same_weights(model, before)


def test_parametrized_experts_raise() -> None:
    """Catches a parametrization of torch's on a patched module, which would have no effect."""
    from torch.nn.utils import parametrize

    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = zoo.build("qwen3_moe")
    [experts, *_] = helpers.experts_modules(model)
    with patched(model, device="cpu"):
        parametrize.register_parametrization(experts, "down_proj", Doubled())
        with pytest.raises(RuntimeError, match=r"after patching, where it has no effect; unpatch the model"):
            logits(model, prompt(model))
        parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)


# ---- other ways to write or move weights


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "save"])
@everywhere
def test_pickling_raises(dump: Callable[[Any], Any], options: dict[str, Any]) -> None:
    """Catches a pickle without experts, or one that fails on a lock with no hint of what to do."""
    model = zoo.build("qwen3_moe")
    with patched(model, **options), pytest.raises(TypeError, match="unpatch it first, or use save_pretrained"):
        dump(model)
    pickle.dumps(model)


@everywhere
def test_loading_weights_into_patched_experts_raises(options: dict[str, Any]) -> None:
    """Catches load_state_dict that fills placeholders, so that the loaded experts are lost."""
    model, other = zoo.build("qwen3_moe"), zoo.build("qwen3_moe", seed=7)
    ids, before = prompt(model), helpers.weights(model)
    with patched(model, **options):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=r"cannot load weights .* unpatch the model first"):
                model.load_state_dict(other.state_dict(), assign=assign)
        rest = {name: tensor for name, tensor in before.items() if "experts" not in name}
        assert all("experts" in name for name in model.load_state_dict(rest, strict=False).missing_keys)
    helpers.assert_same_weights(model, before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_placeholders_hold_no_data() -> None:
    """Catches code that reads a patched module's parameters and gets something that looks like weights."""
    model = zoo.build("qwen3_moe")
    [experts, *_] = helpers.experts_modules(model)
    shape = experts.gate_up_proj.shape
    with patched(model, device="cpu"):
        assert experts.gate_up_proj.shape == shape
        with pytest.raises((RuntimeError, NotImplementedError)):
            experts.gate_up_proj.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            experts.gate_up_proj.numpy(force=True)
