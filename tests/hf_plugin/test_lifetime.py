"""What a model leaves behind when nobody holds it, and what it says of slow paths that it takes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from transformers import PreTrainedModel

import moebius
from tests import zoo
from tests.hf_plugin import helpers, quantized_checkpoints
from tests.hf_plugin.helpers import EMULATED, experts_modules, prompt

Make = Callable[[Path], PreTrainedModel]


def _patched(**options: Any) -> Make:
    return lambda folder: moebius.patch(zoo.build("qwen3_moe"), **options)


def _loaded(**options: Any) -> Make:
    def load(folder: Path) -> PreTrainedModel:
        zoo.build("qwen3_moe").save_pretrained(folder)
        return moebius.from_pretrained(str(folder), **options)

    return load


def _by_config(folder: Path) -> PreTrainedModel:
    model = zoo.build("qwen3_moe")
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=moebius.MoebiusConfig(device="cpu"))


def _quantised(folder: Path) -> PreTrainedModel:
    quantized_checkpoints.write("qwen3_moe", folder, "fp8")
    return moebius.from_pretrained(str(folder), device="cpu")


WAYS: dict[str, Make] = {
    "patched": _patched(device="cpu"), "emulated": _patched(**EMULATED), "loaded": _loaded(device="cpu"),
    "loaded emulated": _loaded(**EMULATED), "disk": _loaded(device="cpu", cpu_memory=0.5), "config": _by_config,
    "fp8": _quantised,
}  # fmt: skip


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS.keys())
@pytest.mark.usefixtures("no_collector")
def test_a_dropped_model_gives_its_memory_back_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a reference cycle: all experts would stay until Python's collector runs, which tensors do not hasten."""
    from moebius.hf_plugin.running import expert_files

    monkeypatch.setattr(expert_files, "cache_root", lambda: tmp_path / "cache")
    helpers.logits(used := make(tmp_path / "first"), prompt(used))  # what is compiled now keeps frames in cycles
    del used
    gc.collect()
    model = make(tmp_path / "model")
    layer = experts_modules(model)[0]._moebius
    watched = [ref(model), ref(layer.runtime), ref(layer.held)]  # type: ignore[union-attr]
    del layer
    helpers.logits(model, prompt(model))
    helpers.greedy(model, prompt(model))
    del model
    assert [type(found).__name__ for reference in watched if (found := reference()) is not None] == []


@pytest.mark.parametrize("way", ["patched", "loaded"])
def test_torch_code_is_said_once(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches experts that run slower than others, which only the statistics would show."""
    model = zoo.build("muse_spark")
    with caplog.at_level(logging.WARNING):
        if way == "patched":
            moebius.patch(model, device="cpu")
        else:
            model.save_pretrained(tmp_path)
            model = moebius.from_pretrained(str(tmp_path), device="cpu")
        helpers.logits(model, prompt(model))
    slow = [name.partition(":")[0] for name in moebius.stats(model).notes if "torch code" in name]
    [record] = [record for record in caplog.records if "torch code" in record.message]
    assert f"{len(slow)} modules ({slow[0]}, ...)" in record.message
    assert record.name.startswith("moebius")
    caplog.clear()
    moebius.patch(zoo.build("qwen3_moe"), device="cpu")
    assert "torch code" not in caplog.text
