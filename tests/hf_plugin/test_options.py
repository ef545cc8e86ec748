"""Options: their forms, and storage formats that keep or lose bits. Bad values are in test_bad_input.py."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import moebius
from moebius.hf_plugin.options import Options, parse_memory
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, assert_same_weights, everywhere, logits, patched, prompt, unchanged

TOTAL = 1000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", None),
        (123, 123),
        (1, 1),
        (1.0, TOTAL),
        (0.25, 250),
        ("25%", 250),
        (" 100% ", TOTAL),
        ("12.5%", 125),
        ("8GiB", 8 << 30),
        ("8GB", 8 * 10**9),
        ("1.5GiB", 3 << 29),
        ("512MiB", 512 << 20),
    ],
)
def test_forms_of_memory(value: Any, expected: int | None) -> None:
    """Catches 1 byte and 100 % mixed up, and decimal units for binary ones."""
    assert parse_memory(value, TOTAL) == expected


@settings(derandomize=True, max_examples=200)
@given(st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.none(), st.booleans()), st.integers(1, 1 << 50))
def test_any_memory_is_understood_or_refused(value: Any, total: int) -> None:
    """Catches other errors than ValueError, and fractions that give more than the whole."""
    try:
        found = parse_memory(value, total)
    except ValueError:
        with pytest.raises(ValueError, match="is not understood or not positive; use bytes"):
            parse_memory(value, total)
        return
    assert value == "auto" if found is None else found >= 0
    if isinstance(value, float):
        assert found is not None
        assert found <= total


def test_options_are_the_arguments_of_patch() -> None:
    """Catches an option that patch takes and Options does not document, or the reverse, and one without effect."""
    names = {field.name for field in fields(Options)}
    assert names == {
        *(
            "device",
            "gpu_memory",
            "cpu_memory",
            "expert_format",
            "cpu_threads",
            "cache_policy",
            "predictor",
            "prefetch",
        ),
        *("profile", "emulated_link", "keep_original"),
    }
    assert [p.kind for p in inspect.signature(moebius.patch).parameters.values()][1:] == [inspect.Parameter.VAR_KEYWORD]
    assert moebius.Options is Options
    documented = inspect.getdoc(Options) or ""
    assert all(f"{name}: " in documented for name in names)
    with pytest.raises(FrozenInstanceError):
        Options().device = "cpu"  # type: ignore[misc]


def test_options_reach_the_model() -> None:
    """Catches options that are checked and forgotten."""
    model = zoo.build("qwen3_moe")
    given = {"device": "emulated", "gpu_memory": "50%", "cpu_threads": 2, "prefetch": False, "emulated_link": 5.0}
    with patched(model, **given):
        stats = moebius.stats(model)
        runtime = vars(helpers.experts_modules(model)[0])["_moebius"].runtime
        assert runtime.options == Options(**given)
        assert runtime.executor.threads == 2
    assert (stats.device, stats.policy, stats.predictor, stats.slots) == ("emulated", "default", "none", 8)


def test_auto_is_a_device_that_is_there() -> None:
    """Catches "auto" that stays unresolved, or that means emulation."""
    model = zoo.build("qwen3_moe")
    with patched(model):
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert moebius.stats(model).device == expected


def test_auto_budget_holds_all_of_a_small_model() -> None:
    """Catches a reserve larger than the free memory of any machine."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="emulated", gpu_memory="auto"):
        assert moebius.stats(model).slots == 16


# ---- formats


def _representable(dtype: torch.dtype) -> PreTrainedModel:
    """A float32 model whose weights the format holds exactly."""
    return zoo.build("gpt_oss").to(dtype).float()


def _expert_bytes(model: PreTrainedModel) -> int:
    return moebius.stats(model).expert_bytes


@pytest.mark.parametrize(("format", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@everywhere
def test_a_lossless_format_is_allowed(format: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Catches a refusal of what loses nothing, a store of the old size, and arithmetic in the storage format."""
    model = _representable(dtype)
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with patched(model, **options):
        full = _expert_bytes(model)
    with patched(model, **(options | {"expert_format": format})):
        assert _expert_bytes(model) < 0.6 * full
        assert_close(logits(model, ids), want)
        assert_close(logits(model, ids), want)
        assert_same_weights(model, before)
    assert_same_weights(model, before)


@pytest.mark.parametrize(
    ("special", "lossless"),
    [
        (float("inf"), ("bf16", "fp16")),
        (-0.0, ("bf16", "fp16")),
        (2.0**-133, ("bf16",)),  # subnormal in bfloat16
        (2.0**-134, ()),
        (65536.0, ("bf16",)),  # beyond float16
        (3.4e38, ()),  # beyond bfloat16, whose rounding gives infinity
        (1 + 2.0**-9, ("fp16",)),
    ],
)
def test_formats_are_lossless_to_the_bit_or_refused(special: float, lossless: tuple[str, ...]) -> None:
    """Catches a comparison that overlooks signs of zero, subnormals or values beyond a format's range."""
    model = _representable(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data[parameter.abs() < 2.0**-10] = 0  # so that float16 holds the rest as well
    [experts, *_] = helpers.experts_modules(model)
    with torch.no_grad():
        experts.down_proj[1, 2, 3] = special
    before = helpers.weights(model)
    for format in ("bf16", "fp16"):
        if format in lossless:
            with patched(model, device="cpu", expert_format=format):
                assert_same_weights(model, before)
        else:
            with unchanged(model), pytest.raises(ValueError, match="would change weights"):
                moebius.patch(model, device="cpu", expert_format=format)
        assert_same_weights(model, before)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
@everywhere
def test_a_lossy_format_needs_the_originals(format: str, options: dict[str, Any]) -> None:
    """Catches weights that a patch rounds for good."""
    model = zoo.build("gpt_oss")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with unchanged(model), pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts'.*keep_original=True"):
        moebius.patch(model, **(options | {"expert_format": format}))
    with patched(model, **(options | {"expert_format": format, "keep_original": True})):
        got = logits(model, ids)
        assert 0 < (got - want).abs().max() < 0.02 * want.abs().max()
        assert_same_weights(model, before)
    assert_same_weights(model, before)
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@everywhere
def test_a_wider_format_is_lossless(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Catches a store in float32 of a half-precision model that changes its dtype or its bits."""
    model = zoo.build("qwen3_moe", dtype=dtype)
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with patched(model, **(options | {"expert_format": "fp32"})):
        got = logits(model, ids)
        assert got.dtype == dtype
        assert (got.float() - want.float()).abs().max() < 0.05 * want.float().abs().max()
        assert_same_weights(model, before)
    assert_same_weights(model, before)


def test_native_keeps_the_dtype() -> None:
    """Catches a default that converts."""
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)):
        model = zoo.build("qwen3_moe", dtype=dtype)
        with patched(model, device="cpu"):
            assert _expert_bytes(model) == 16 * 3 * 64 * 32 * width
