"""What gpu_memory="auto" leaves free: beside the KV caches that models really fill, and on devices of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.hf_plugin.running import reserve
from moebius.hf_plugin.running.reserve import UNKNOWN_BYTES, WORKSPACE_BYTES, Reserve, reserve_for
from tests import zoo
from tests.hf_plugin import helpers

TOKENS = 200
# compressed on the fly; values in float32 beside keys; encoder and decoder; windows beside a prefix
UNUSUAL = {"deepseek_v4": 14.0, "nllb_moe": 51.0, "unlimited_ocr": 1e9}
WITHOUT_CACHE = {"openai_privacy_filter", "switch_transformers"}


def _kept(cache: Any) -> Iterator[Tensor]:
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in cache.layers:
        found = (getattr(layer, name, None) for name in ("keys", "values", "indexer_keys"))
        yield from (tensor for tensor in found if isinstance(tensor, Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo.available()) - WITHOUT_CACHE))
def test_the_kv_cache_of_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches windows, latent attention, hybrid layers and shared heads that a formula takes for something else."""
    monkeypatch.setattr(reserve, "CONTEXT_TOKENS", TOKENS)
    model = zoo.build(name)
    with torch.no_grad():
        output = model(**zoo.inputs(model, 1, TOKENS), use_cache=True)
    real = sum(tensor.nbytes for tensor in _kept(output.past_key_values))
    assert 0.9 * real <= reserve_for(model.config, 4).kv_bytes <= UNUSUAL.get(name, 1.1) * max(real, 1)


def test_a_large_model() -> None:
    """Catches bytes taken for values, and a context of 262,144 tokens that leaves no room for any expert."""
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = Qwen3MoeConfig(**sizes, head_dim=128, num_experts_per_tok=8, max_position_embeddings=262_144)
    found = reserve_for(config, 2)
    assert found.tokens == 16384
    assert found.kv_bytes == 48 * 2 * 4 * 128 * 2 * 16384
    assert 0.2e9 < found.activation_bytes < 1.5e9


def test_the_keys_of_an_indexer() -> None:
    """Catches a reserve of 16384 tokens that lacks a fifth of what DeepSeek's sparse attention keeps."""
    from transformers import GlmMoeDsaConfig

    sizes: dict[str, Any] = {"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    some = GlmMoeDsaConfig(**sizes, index_head_dim=128, indexer_types=["full", "shared", "full", "shared"])
    every = GlmMoeDsaConfig(**sizes, index_head_dim=128, indexer_types=["full"] * 4)
    assert reserve_for(every, 2).kv_bytes - reserve_for(some, 2).kv_bytes == 2 * 128 * 2 * reserve_for(some, 2).tokens


def test_a_short_context_needs_little() -> None:
    """Catches a reserve for tokens that the model cannot have."""
    model = helpers.trained()
    found = reserve_for(model.config, 4)
    assert found.tokens == 1024
    assert found.kv_bytes == 6 * 2 * 2 * 32 * 4 * 1024


@pytest.mark.parametrize("config", [None, {}, object()], ids=["none", "dict", "other"])
def test_models_without_a_configuration(config: object) -> None:
    assert reserve_for(config, 2) == Reserve(0, 0, UNKNOWN_BYTES)


def test_every_device_keeps_its_share() -> None:
    """Catches keys of all layers reserved on each of several devices, and a small device that is left without cache."""
    need, large = Reserve(1000, 6 << 30, 1 << 30), 80 << 30
    assert need.on_device(1.0, large) == (7 << 30) + WORKSPACE_BYTES
    assert need.on_device(0.5, large) == (4 << 30) + WORKSPACE_BYTES
    assert need.on_device(1.0, WORKSPACE_BYTES + (8 << 30)) == (4 << 30) + WORKSPACE_BYTES
    assert need.on_device(1.0, 1 << 20) == WORKSPACE_BYTES


def test_auto_leaves_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a budget that does not follow the model's context."""
    model = helpers.trained()
    need, record = reserve_for(model.config, 4), 3 * 128 * 48 * 4
    wanted = need.kv_bytes + need.activation_bytes
    assert wanted > 20 * record, "so that the reserve is not cut to half"
    monkeypatch.setattr(EmulatedDevice, "free_memory", lambda self: WORKSPACE_BYTES + 2 * wanted)
    with helpers.patched(model, device="emulated", gpu_memory="auto"):
        assert moebius.stats(model).slots == min(192, wanted // record)
