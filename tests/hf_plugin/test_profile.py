"""Profiles: a warm start is better than none, a wrong one is forgotten, and a file that does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import moebius
from moebius.gpu_cache.policy import POLICIES, Reason, make_policy
from moebius.gpu_cache.slots import SlotTable
from moebius.hf_plugin.patching import runtimes
from moebius.hf_plugin.profile import Profile, read_profile
from moebius.hf_plugin.tools.trace_file import Trace, read_trace
from moebius.predictors.forecaster import Forecaster
from tests import zoo
from tests.gpu_cache.layers import some
from tests.hf_plugin.helpers import EMULATED, logits, patched

EXCERPT = Path(__file__).parents[1] / "data" / "traces" / "gpt_oss_20b_excerpt.npz"
LAYERS = 8


@pytest.fixture(scope="module")
def halves() -> tuple[Trace, Trace]:
    """Sequences to learn from, and others."""
    trace = read_trace(EXCERPT)
    trace = replace(trace, ids=np.ascontiguousarray(trace.ids[:, :LAYERS]))
    cut = len(trace.offsets) // 2
    return trace.only(np.arange(cut)), trace.only(np.arange(cut, len(trace.offsets) - 1))


def costs(held_out: Trace, uses: list[np.ndarray] | None, slots: int) -> np.ndarray:
    """Misses and uploads in each sequence's first 50 tokens, and the next 100; the cache is filled beforehand."""
    found, experts = np.zeros(2), [held_out.experts] * LAYERS
    for start in held_out.offsets[:-1]:
        policy, table = make_policy("default", experts), SlotTable(experts, slots * LAYERS)
        if uses is not None:
            for layer, use in enumerate(uses):
                policy.start_from(layer, use)
            for slot, key in enumerate(np.argsort(-np.concatenate(uses))[: table.slots].tolist()):
                table.reserve(key // held_out.experts, some(slot), some(key % held_out.experts))
                table.publish(some(slot))
        for number, token in enumerate(held_out.ids[start : start + 150]):
            for layer, used in enumerate(token):
                hit = table.lookup(layer, used) >= 0
                policy.used(layer, used, hit)
                missed = used[~hit]
                chosen = policy.place(table, layer, missed, Reason.ADMIT)
                table.reserve(layer, chosen[chosen >= 0], missed[chosen >= 0])
                table.publish(chosen[chosen >= 0])
                found[int(number >= 50)] += len(missed) + int((chosen >= 0).sum())
    return found


@pytest.mark.parametrize("slots", [8, 16])
def test_the_first_tokens_cost_less_and_a_wrong_profile_is_forgotten(slots: int) -> None:
    """Catches a profile that values no expert, and one that outweighs the conversation. Each subject is new once."""
    trace = read_trace(EXCERPT)
    trace = replace(trace, ids=np.ascontiguousarray(trace.ids[:, :LAYERS]))
    cold, warm, opposite = np.zeros((3, 2))
    sequences = range(len(trace.offsets) - 1)
    for new in sequences:
        known, held_out = trace.only(np.array([s for s in sequences if s != new])), trace.only(np.array([new]))
        uses = Profile.of_trace(known).uses
        cold += costs(held_out, None, slots)
        warm += costs(held_out, uses, slots)
        opposite += costs(held_out, [use.max() - use for use in uses], slots)
    assert warm[0] < 0.95 * cold[0]
    assert opposite[0] > 1.02 * cold[0], "the profile has no effect"
    assert opposite[1] < 1.05 * cold[1]


def test_forecasts_start_from_it(halves: tuple[Trace, Trace]) -> None:
    """Catches habits that are written to the wrong source or layer."""
    learned, held_out = halves
    habits, found = Profile.of_trace(learned).habits, []
    for warm in (False, True):
        right = 0
        for start in held_out.offsets[:-1]:
            forecaster = Forecaster([held_out.experts] * LAYERS, held_out.top_k, rows=1)
            for layer in range(LAYERS) if warm else ():
                forecaster.adopt(layer, habits[layer])
            for token in held_out.ids[start : start + 50]:
                for layer, used in enumerate(token):
                    forecaster.observe(layer, used[None])
                    said = forecaster.forecast(layer)
                    if said is not None:
                        right += int(np.isin(np.argsort(-said)[: held_out.top_k], token[layer + 1]).sum())
        found.append(right)
    assert found[1] > 1.05 * found[0]


def test_it_is_small(halves: tuple[Trace, Trace], tmp_path: Path) -> None:
    """Catches weights that are kept whole."""
    Profile.of_trace(halves[0]).save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 4096 * LAYERS


@pytest.mark.parametrize("name", set(POLICIES) - {"lru"})
def test_policies_remember_what_was_used(name: str) -> None:
    """Catches shares in other units, which the next start would take for steps."""
    policy = make_policy(name, [3, 4])
    for step in range(400):
        policy.used(0, np.array([0] if step % 4 else [0, 2], np.int32), np.ones(2 - bool(step % 4), bool))
    use = policy.use(0)
    assert use[0] == pytest.approx(1.0, abs=0.02)
    assert use[1] == 0
    again = make_policy(name, [3, 4])
    again.start_from(0, np.array([0.0, 0.9, 0.1]))
    table = SlotTable([3, 4], 1)
    table.reserve(0, some(0), some(1))
    table.publish(some(0))
    assert again.place(table, 0, np.array([2], np.int32), Reason.ADMIT).tolist() == [-1]


def test_from_live_use_to_the_next_patch(tmp_path: Path) -> None:
    """Catches a profile that is saved, but neither fills the cache nor reaches the predictor."""
    model, path = zoo.build("qwen3_moe"), str(tmp_path / "p.safetensors")
    with patched(model, **EMULATED):
        for token in range(30):
            logits(model, torch.tensor([[token % 3]]))
        moebius.save_profile(model, path)
    profile = read_profile(path)
    with patched(model, **EMULATED, profile=path):
        [runtime] = runtimes(model)
        cache = runtime.tiers[0].cache
        assert cache.resident.sum() == cache.slots
        shares = np.concatenate(profile.uses)
        kept = np.concatenate([cache.layer(layer).slots() >= 0 for layer in range(len(profile.uses))])
        assert shares[kept].min() >= shares[~kept].max()
        assert moebius.stats(model).sums.uploads == 0
        logits(model, torch.tensor([[0]]))
        assert runtime.lookahead is not None
        assert runtime.lookahead.forecaster is not None
        assert not np.array_equal(runtime.lookahead.forecaster.habits(1).bias, Forecaster([8, 8], 2).habits(1).bias)


def test_what_cannot_be_saved() -> None:
    """Catches a profile of nothing."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="cpu"), pytest.raises(ValueError, match="moebius trace --profile"):
        moebius.save_profile(model, "x")
    with patched(model, **EMULATED, cache_policy="lru"), pytest.raises(ValueError, match="remembers no shares"):
        moebius.save_profile(model, "x")
    with pytest.raises(ValueError, match="not patched"):
        moebius.save_profile(model, "x")


def test_files_that_do_not_fit(tmp_path: Path, halves: tuple[Trace, Trace]) -> None:
    """Catches a profile of another model that is used all the same, or found out when the model is half patched."""
    model, path = zoo.build("qwen3_moe"), tmp_path / "p.safetensors"
    found = Profile.of_trace(halves[0])
    found.save(path)
    with pytest.raises(ValueError, match=r"is of a model with 8 layers of 32 experts, but this one has 2 layers of 8"):
        moebius.patch(model, **EMULATED, profile=str(path))
    habits = [part._replace(bias=part.bias * np.nan) for part in found.habits]
    Profile(found.uses, habits).save(path)
    with pytest.raises(ValueError, match="damaged"):
        moebius.patch(model, **EMULATED, profile=str(path))
    for content in (b"", b"no profile at all" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a routing profile"):
            moebius.patch(model, **EMULATED, profile=str(path))
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a routing profile"):
        moebius.patch(model, **EMULATED, profile=str(path))
    with pytest.raises(FileNotFoundError):
        moebius.patch(model, **EMULATED, profile=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="path of a file as a string"):
        moebius.patch(model, **EMULATED, profile=path)
    assert not moebius.is_patched(model)
