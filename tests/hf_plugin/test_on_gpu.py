"""Whole models on CUDA: what no emulation shows. Results, memory that comes back, memory that runs out."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moebius
from moebius.gpu_cache.accelerator import AcceleratorDevice
from moebius.gpu_cache.driver import Driver
from moebius.hf_plugin.running import runtime
from moebius.hf_plugin.running.runtime import ModelRuntime
from moebius.predictors.costs import Assignment, CostModel
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(model: PreTrainedModel) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model and a prompt on the device."""
    return model.to("cuda"), prompt(model).to("cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_results(budget: float) -> None:
    """Catches a kernel, a copy or a merge that is right on CPU tensors only; at 1.0 all experts become resident."""
    model, ids = on_gpu(helpers.trained())
    want, tokens = logits(model, ids), greedy(model, ids)
    with patched(model, device="cuda", gpu_memory=budget):
        for _ in range(4):
            assert_close(logits(model, ids), want)
            assert greedy(model, ids) == tokens
        stats = moebius.stats(model)
        assert stats.sums.hits > 0
        assert stats.caches[0].device == f"cuda:{torch.cuda.current_device()}"
        assert not any("not pinned" in note for note in stats.notes)
    assert_close(logits(model, ids), want)


def test_the_processors_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches whatever makes the host wait for the device between the launch of its experts and the CPU's own, or
    before it goes on to the next layer: a copy from pageable memory, a tensor that is looked at."""
    compute, on_cpu, layer = AcceleratorDevice.compute, ModelRuntime.on_cpu, runtime.run_layer
    launched: list[Any] = []
    beside, after = [], []

    def slow(self: Any, work: Any, uploads: Any) -> Any:
        def sleepy() -> torch.Tensor:
            torch.cuda._sleep(20_000_000)  # 10 ms
            return work()

        launched.append(compute(self, sleepy, uploads))
        return launched[-1]

    def watched(self: Any, *arguments: Any) -> None:
        if launched:
            beside.append(not launched[-1].completion.done())
        on_cpu(self, *arguments)

    def returned(*arguments: Any) -> torch.Tensor:
        launched.clear()
        result = layer(*arguments)
        if launched:
            after.append(not launched[-1].completion.done())
        return result

    model, ids = on_gpu(helpers.trained())
    want = greedy(model, ids[:1])
    with patched(model, device="cuda", gpu_memory=0.5):
        monkeypatch.setattr(
            CostModel, "assign", lambda self, routes, slots: Assignment.where(slots >= 0, routes, slots)
        )
        assert greedy(model, ids[:1]) == want
        monkeypatch.setattr(AcceleratorDevice, "compute", slow)
        monkeypatch.setattr(ModelRuntime, "on_cpu", watched)
        monkeypatch.setattr(runtime, "run_layer", returned)
        assert greedy(model, ids[:1]) == want
    assert len(beside) > 4
    assert all(beside), "the CPU began when the device had ended"
    assert all(after), "the layer returned when the device had ended"


def test_staged_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a buffer of the ring that is filled again while the link still reads it, or the wrong device's stream."""
    monkeypatch.setattr(Driver, "register", lambda self, host: "refused by the test")
    model, ids = on_gpu(helpers.trained())
    want = logits(model, ids)
    with patched(model, device="cuda", gpu_memory=0.3):
        for _ in range(6):
            assert_close(logits(model, ids), want)
        stats = moebius.stats(model)
        assert stats.sums.uploads > 0
        assert any("not pinned (refused by the test)" in note for note in stats.notes)
    assert not [thread for thread in threading.enumerate() if thread.name == "moebius-staging"]


@pytest.mark.slow
def test_two_hundred_cycles_give_all_memory_back() -> None:
    """Catches slots, results and pinned pages that outlive unpatch; workspaces of libraries come with the first."""
    model = helpers.trained()
    ids, state = prompt(model).to("cuda"), helpers.weights(model)
    allocated: list[int] = []
    for cycle in range(201):
        moebius.patch(model, device="cuda", gpu_memory=0.5)
        records = [vars(module)["_moebius"].store.records for module in helpers.experts_modules(model)]
        assert all(of_layer.is_pinned() for of_layer in records)
        greedy(model, ids)
        if cycle % 50 == 0:
            moebius.resize(model, gpu_memory=0.25)
        moebius.unpatch(model)
        assert not any(of_layer.is_pinned() for of_layer in records)
        del records
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1:] == allocated[:1] * 200
    helpers.assert_same_weights(model, state)


def _wide_model() -> PreTrainedModel:
    """Experts of 768 MiB beside a rest of 18 MiB."""
    sizes: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 4}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, vocab_size=2048, max_position_embeddings=8192)
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def test_memory_that_runs_out_on_the_device() -> None:
    """Catches an error of torch's allocator that does not reach the guard, or memory that is not free after it."""
    model = _wide_model().to("cuda")  # type: ignore[arg-type]
    ids = torch.randint(2048, (1, 4096), generator=torch.Generator().manual_seed(0)).to("cuda")
    want = logits(model, ids).cpu()
    with patched(model, device="cuda", gpu_memory=1.0):
        logits(model, ids)  # loads the kernels, for which the driver wants memory of its own
        before = moebius.stats(model).cache_bytes
        gc.collect()
        torch.cuda.empty_cache()
        hog = torch.empty(torch.cuda.mem_get_info()[0] - (32 << 20), dtype=torch.uint8, device="cuda")
        got = logits(model, ids).cpu()  # hidden states, routed rows and logits of 4096 tokens take over 100 MiB
        assert moebius.stats(model).cache_bytes < before
        del hog
    # among 131,072 choices of an expert some are as good as tied, and rounding decides them
    assert (got - want).norm() < 0.01 * want.norm()


def test_a_model_that_accelerate_offloads() -> None:
    """Catches weights that stay in host memory, or are still copied in every call, after `device_map="auto"`."""
    from accelerate import dispatch_model

    model = helpers.trained()
    ids = prompt(model)
    want = logits(model, ids)
    parts = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    layers = {f"model.layers.{number}": 0 if number < 2 else "cpu" for number in range(6)}
    model = dispatch_model(model, parts | layers)
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    with patched(model, device="cuda", gpu_memory=0.5):
        assert {p.device.type for n, p in model.named_parameters() if "experts" not in n} == {"cuda"}
        for _ in range(3):
            assert_close(logits(model, ids.to("cuda")).cpu(), want)
        assert moebius.stats(model).sums.hits > 0
    kept = model.model.layers[5].self_attn.q_proj._hf_hook.weights_map.dataset.state_dict
    assert {tensor.device.type for tensor in kept.values()} == {"cpu"}
    assert away == [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert_close(logits(model, ids.to("cuda")).cpu(), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_over_two_devices() -> None:
    """Catches hidden states computed on the wrong device, and a cache that only the first has."""
    from accelerate import dispatch_model

    model = helpers.trained()
    ids = prompt(model)
    want = logits(model, ids)
    parts = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    layers = {f"model.layers.{number}": number % 2 for number in range(6)}
    model = dispatch_model(model, parts | layers)
    with patched(model, device="cuda", gpu_memory=0.5):
        for _ in range(3):
            assert_close(logits(model, ids.to("cuda:0")).cpu(), want)
        assert [cache.device for cache in moebius.stats(model).caches] == ["cuda:0", "cuda:1"]
        assert all(layer.hits > 0 for layer in moebius.stats(model).layers)
