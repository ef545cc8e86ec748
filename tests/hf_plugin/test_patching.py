"""patch and unpatch: whole or not at all, one model and no other, and back byte for byte."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moebius
from moebius.cpu_experts.store import ExpertStore
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.layer_cache import LayerCache
from moebius.hf_plugin.running import layer as layer_module
from moebius.hf_plugin.running.held import HeldWeights
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import (
    EMULATED,
    assert_close,
    assert_same_weights,
    everywhere,
    greedy,
    logits,
    patched,
    prompt,
    unchanged,
)


@everywhere
def test_same_object_and_same_parameters(options: dict[str, Any]) -> None:
    """Catches a copy of the model, and parameters that unpatch replaces: an optimiser holds the old ones."""
    model = zoo.build("qwen3_moe")
    parameters = dict(model.named_parameters())
    with unchanged(model):
        assert not moebius.is_patched(model)
        assert moebius.patch(model, **options) is model
        assert moebius.is_patched(model)
        assert list(dict(model.named_parameters())) == list(parameters)
        logits(model, prompt(model))
        assert moebius.unpatch(model) is model
        assert not moebius.is_patched(model)
    assert all(after is parameters[name] for name, after in model.named_parameters())
    with pytest.raises(ValueError, match="not patched"):
        moebius.unpatch(model)


@everywhere
def test_again_and_again(options: dict[str, Any]) -> None:
    """Catches weights that a cycle rounds, and anything of one patch that reaches the next."""
    model = zoo.build("gpt_oss")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    for round in range(3):
        with patched(model, **(options | {"prefetch": round % 2 == 0})):
            assert_close(logits(model, ids), want)
            assert moebius.stats(model).to_dict()["tokens"] == ids.numel()
        assert_same_weights(model, before)
        assert torch.equal(logits(model, ids), want)


@everywhere
def test_the_patch_runs_the_experts_and_leaves_the_rest(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a patch that does nothing, and one that takes over more than the routed experts."""
    model = zoo.build("deepseek_v3")
    ids = prompt(model)
    want = logits(model, ids)
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with patched(model, **options):
        changed = [n for n, m in model.named_modules() if vars(m).get("forward") is not forwards[n]]
        if options["device"] != "cpu":
            changed.remove("")  # the model's own, which is run again where memory runs out
        assert changed
        assert all(name.endswith(".mlp.experts") for name in changed)
        with monkeypatch.context() as silent:
            silent.setattr(layer_module.PatchedLayer, "compute", lambda self, hidden, *_: torch.zeros_like(hidden))
            assert (logits(model, ids) - want).abs().max() > 1e-3 * want.abs().max()
        assert_close(logits(model, ids), want)


# ---- one model and no other


@everywhere
def test_two_models_that_share_a_config(options: dict[str, Any]) -> None:
    """Catches a selection in the config object, which would switch every model that has it."""
    model = zoo.build("qwen3_moe")
    other = type(model)(model.config).eval()
    other.load_state_dict(zoo.build("qwen3_moe", seed=3).state_dict())
    assert other.config is model.config
    ids, before = prompt(model), copy.deepcopy(vars(model.config))
    want = [logits(m, ids) for m in (model, other)]
    with unchanged(other):
        with patched(model, **options):
            assert vars(model.config) == before
            assert not moebius.is_patched(other)
            assert torch.equal(logits(other, ids), want[1])
            assert_close(logits(model, ids), want[0])
            with patched(other, **options):
                assert_close(logits(other, ids), want[1])
            assert_close(logits(model, ids), want[0])
        assert torch.equal(logits(other, ids), want[1])
    assert vars(model.config) == before


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_chosen_implementation_survives(implementation: str) -> None:
    """Catches unpatch that sets the default implementation instead of what the user had."""
    model = zoo.build("qwen3_moe")
    model.set_experts_implementation(implementation)
    ids = prompt(model)
    want = logits(model, ids)
    with patched(model, **EMULATED):
        assert_close(logits(model, ids), want)
        assert model.get_experts_implementation() == {"": implementation}
        model.set_experts_implementation("eager")  # has no effect on patched experts, and stays
        assert_close(logits(model, ids), want)
    assert model.get_experts_implementation() == {"": "eager"}


def test_a_model_within_a_model() -> None:
    """Catches paths taken from the root: a base model may be patched within its head, or on its own."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = greedy(model, ids)
    with unchanged(model):
        moebius.patch(model.model, **EMULATED)
        assert moebius.is_patched(model)
        assert greedy(model, ids) == want
        assert moebius.stats(model).to_dict()["hits"] > 0
        moebius.unpatch(model)
        assert greedy(model, ids) == want


def test_parts_patched_one_by_one() -> None:
    """Catches statistics of one part that pass for those of all, and an unpatch that forgets parts."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    with unchanged(model):
        for part in model.model.layers:
            moebius.patch(part, **EMULATED)
        assert_close(logits(model, ids), want)
        for call in (moebius.stats, moebius.reset_stats):
            with pytest.raises(ValueError, match=r"2 parts of the model were patched one by one; ask .* each part"):
                call(model)
        assert all(moebius.stats(part).sums.tokens == ids.numel() for part in model.model.layers)
        moebius.unpatch(model)
        assert not moebius.is_patched(model)


def test_no_other_instance_of_the_class_is_touched() -> None:
    """Catches methods replaced on classes."""
    model = zoo.build("qwen3_moe")
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    before = {cls: dict(vars(cls)) for cls in classes}
    with patched(model, **EMULATED):
        logits(model, prompt(model))
        assert {cls: dict(vars(cls)) for cls in classes} == before


# ---- hooks


@everywhere
def test_hooks_on_experts_go_on(options: dict[str, Any]) -> None:
    """Catches a forward that bypasses the module's call, so that the user's hooks no longer fire."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    seen: list[tuple[str, Tensor]] = []
    [experts, *_] = helpers.experts_modules(model)
    experts.register_forward_pre_hook(lambda module, args: seen.append(("in", args[0].clone())))
    experts.register_forward_hook(lambda module, args, output: seen.append(("out", output.clone())))
    logits(model, ids)
    want, seen = seen.copy(), seen
    seen.clear()
    with patched(model, **options):
        logits(model, ids)
    assert [where for where, _ in seen] == ["in", "out"]
    for (_, ours), (_, stock) in zip(seen, want, strict=True):
        assert_close(ours, stock)


def test_an_accelerate_hook_that_offloads_nothing_is_kept() -> None:
    """Catches unpatch that deletes the forward which a hook had put on the instance."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    for experts in helpers.experts_modules(model):
        add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu"))
    forwards = [vars(experts)["forward"] for experts in helpers.experts_modules(model)]
    with patched(model, **EMULATED):
        assert_close(logits(model, ids), want)
    assert [vars(experts)["forward"] for experts in helpers.experts_modules(model)] == forwards
    assert torch.equal(logits(model, ids), want)


def test_the_rest_of_an_experts_module_stays() -> None:
    """Catches submodules or attributes of the experts module that the patch moves or drops."""
    model = zoo.build("muse_spark")
    norms = {n: p for n, p in model.named_parameters() if "expert" in n and p.ndim == 1}
    assert norms
    with patched(model, **EMULATED):
        assert all(p is norms[n] for n, p in model.named_parameters() if n in norms)


# ---- rollback


class NoRoomError(Exception):
    pass


def _failing(original: Any, call: int, error: BaseException) -> Any:
    """The function, which raises at its n-th call."""
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args, **kwargs)

    return function


@pytest.mark.parametrize("error", [NoRoomError("none"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (ExpertStore, "empty", 1),
        (ExpertStore, "empty", 2),
        (HeldWeights, "fill", 4),
        (layer_module.PatchedLayer, "install", 2),
        (ExpertCache, "__init__", 1),
        (LayerCache, "fetch", 1),
        (LayerCache, "launch", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_patch_is_whole_or_not_at_all(
    target: Any, name: str, call: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model half patched, or threads and memory kept, where a later layer or the cache fails."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    with unchanged(model):
        with monkeypatch.context() as failing:
            failing.setattr(target, name, _failing(getattr(target, name), call, error))
            with pytest.raises(type(error)):
                moebius.patch(model, **EMULATED, cpu_threads=2)
        assert not moebius.is_patched(model)
        assert torch.equal(logits(model, ids), want)
    with patched(model, **EMULATED):
        assert_close(logits(model, ids), want)


def test_one_bad_layer_refuses_the_whole() -> None:
    """Catches layers patched before a later one is found to compute something else."""
    model = zoo.build("qwen3_moe")
    last = helpers.experts_modules(model)[-1]

    class Doubled(type(last)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    last.__class__ = Doubled
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts' \(Doubled\) computes something else"),
    ):
        moebius.patch(model, **EMULATED)
    assert not moebius.is_patched(model)


# ---- memory


def test_the_peak_is_one_layer_above_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a patch that holds all experts twice."""
    model = zoo.build("deepseek_v4")  # four layers
    modules = helpers.experts_modules(model)
    parameters = [p for module in modules for p in module.parameters() if p.ndim == 3]
    layer_bytes = sum(p.nbytes for p in parameters) // len(modules)
    total, stores, peaks = layer_bytes * len(modules), 0, []
    original = ExpertStore.empty

    def counted(*args: Any) -> ExpertStore:
        nonlocal stores
        store = original(*args)
        stores += store.nbytes
        peaks.append(stores + sum(p.nbytes for p in parameters))
        return store

    monkeypatch.setattr(ExpertStore, "empty", counted)
    with patched(model, device="cpu"):
        assert sum(p.nbytes for p in parameters) == 0, "the experts' original tensors are still there"
    assert len(peaks) == len(modules) > 2
    assert max(peaks) <= total + layer_bytes


def test_kept_originals_are_the_very_tensors() -> None:
    """Catches a copy of all experts where keeping them is enough."""
    model = zoo.build("qwen3_moe")
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with patched(model, device="cpu", expert_format="bf16", keep_original=True):
        pass
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


# ---- resize


def test_resize_changes_the_budget_at_run_time() -> None:
    """Catches a cache that keeps its slots, loses its layers, or forgets statistics."""
    model = zoo.build("qwen3_moe")
    ids, threads = prompt(model), set(threading.enumerate())
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.25):
        for memory, slots in ((0.25, 4), (1.0, 16), ("50%", 8), (3 * 64 * 32 * 4, 1)):
            moebius.resize(model, gpu_memory=memory)
            assert moebius.stats(model).slots == slots
            assert greedy(model, ids) == want
        tokens = moebius.stats(model).to_dict()["tokens"]
        for bad in ("lots", -1, 1, 7.0):
            with pytest.raises(ValueError, match=r"memory|budget"):
                moebius.resize(model, gpu_memory=bad)
            assert moebius.stats(model).slots == 1
        assert moebius.stats(model).to_dict()["tokens"] == tokens == 4 * (ids.numel() + 14)
        assert greedy(model, ids) == want
    assert set(threading.enumerate()) <= threads


def test_everything_resident_needs_no_cpu() -> None:
    """Catches a full cache that still misses: after one pass through all experts each of them is a hit."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="emulated", gpu_memory=1.0):
        for seed in range(12):
            logits(model, zoo.inputs(model, 2, 24, seed=seed)["input_ids"])
            moebius.stats(model)
        moebius.reset_stats(model)
        _settle(model)
        logits(model, zoo.inputs(model, 2, 24, seed=0)["input_ids"])
        stats = moebius.stats(model).to_dict()
    assert (stats["misses"], stats["uploads"]) == (0, 0)
    assert stats["hits"] == 2 * 2 * 48


def _settle(model: PreTrainedModel) -> None:
    [first, *_] = helpers.experts_modules(model)
    vars(first)["_moebius"].runtime.tiers[0].cache.drain()


def test_statistics_start_anew() -> None:
    """Catches counters that a reset leaves, or a reset that empties the cache."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    with patched(model, **EMULATED):
        greedy(model, ids)
        before = moebius.stats(model)
        moebius.reset_stats(model)
        sums = moebius.stats(model).to_dict()
        assert all(sums[key] == 0 for key in ("tokens", "hits", "misses", "uploads", "cpu_ms", "predicted"))
        _settle(model)
        logits(model, ids)
        assert moebius.stats(model).to_dict()["hits"] > 0
    assert before.sums.hits > 0, "a snapshot must not change with the counters"
