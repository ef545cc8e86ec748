"""Whole models for `gpu.py`: gpt-oss-20b's expert shape, random weights, the routing of real text in every variant."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

import moebius
from moebius.hf_plugin.generation import generate_greedily
from moebius.hf_plugin.patching import runtimes
from moebius.predictors.costs import CostModel

if TYPE_CHECKING:
    from benchmarks.gpu import Report

BUDGETS = (0.125, 0.25, 0.5, 0.75, 1.0)
FORMATS = ("bf16", "int4")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; `TINY` only shows that the script runs."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    heads: int
    prompts: tuple[int, ...]
    warm_tokens: int
    new_tokens: int


FULL = Plan(24, 32, 2880, 2880, 64, (128, 2048), 64, 48)
TINY = Plan(2, 4, 32, 16, 2, (4, 9), 3, 4)


class ForcedRouting:
    """Replaces what the routers choose by the rows of a trace, one row for each token of each layer."""

    def __init__(self, model: PreTrainedModel, ids: np.ndarray) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(model.device)  # [T, L, k]
        self.rows = [0] * ids.shape[1]
        self.empty = False  # no expert at all
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.forward = self._router(number, layer.mlp.gate.num_experts)

    def restart(self, row: int = 0) -> None:
        self.rows = [row] * len(self.rows)

    def _router(self, number: int, experts: int) -> Any:
        def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            row = self.rows[number] % (len(self.ids) - tokens)
            self.rows[number] = row + tokens
            chosen = self.ids[row : row + tokens, number]
            weights = torch.full(chosen.shape, 1 / chosen.shape[1], dtype=hidden_states.dtype, device=chosen.device)
            logits = torch.zeros(tokens, experts, dtype=hidden_states.dtype, device=chosen.device)
            return logits, weights, torch.full_like(chosen, experts) if self.empty else chosen

        return forward


def build(plan: Plan, top_k: int, device: torch.device) -> PreTrainedModel:
    """Random weights, made where they stay."""
    config = Qwen3MoeConfig(
        hidden_size=plan.hidden, moe_intermediate_size=plan.intermediate, intermediate_size=plan.intermediate,
        num_hidden_layers=plan.layers, num_experts=plan.experts, num_experts_per_tok=top_k, vocab_size=4096,
        num_attention_heads=plan.heads, num_key_value_heads=max(1, plan.heads // 8), head_dim=64,
        max_position_embeddings=8192, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def read_ids(path: str | None, plan: Plan, top_k: int = 4) -> np.ndarray:
    """Recorded routing [T, L, k], or random ids where the dry run has no trace."""
    if path is not None:
        with np.load(path) as archive:
            ids = archive["ids"]
        if ids.shape[1] != plan.layers or ids.max() >= plan.experts:
            raise ValueError(f"the trace is of {ids.shape[1]} layers and {ids.max() + 1} experts; {plan} is measured")
        return ids
    rng = np.random.default_rng(0)
    return rng.random((200, plan.layers, plan.experts)).argsort(-1)[..., : min(top_k, plan.experts // 2)]


class FetchAll(CostModel):
    """Every miss is fetched, none is computed on the CPU."""

    def split(self, tokens: np.ndarray, resident: np.ndarray) -> np.ndarray:
        return np.ones(len(tokens), bool)


def measure_model(report: Report, trace: str | None, dry: bool) -> None:
    """Stock, patched in two formats at all budgets, CPU only, fetch only, and accelerate's offload."""
    plan = TINY if dry else FULL
    if trace is None and not dry:
        raise ValueError("whole models need the routing of real text: give --trace")
    ids = read_ids(trace if not dry else None, plan)
    model = build(plan, ids.shape[2], report.device)
    run = Runs(report, plan, model, ForcedRouting(model, ids))
    run.row("stock", "bf16", 1.0)
    device = "emulated" if dry else f"cuda:{report.device.index}"
    for format in FORMATS:
        if perf_counter() > report.deadline:
            report.data["skipped"].append(f"model {format}")
            continue
        with patched(model, device=device, gpu_memory=1.0, expert_format=format):
            for budget in sorted(BUDGETS, reverse=True):
                moebius.resize(model, gpu_memory=budget)
                run.row("moebius", format, budget)
                if budget == 0.25:
                    run.fetch_only(format, budget)
        with patched(model, device="cpu", expert_format=format):
            run.row("cpu", format, 0.0)
    if not dry:
        run.accelerate(0.25)


@contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[None]:
    # recorded ids cannot be foreseen by gates, so that prefetching by them would only cost
    moebius.patch(model, predictor="none", keep_original=options["expert_format"] != "bf16", **options)
    try:
        yield
    finally:
        moebius.unpatch(model)
        gc.collect()


@dataclass(slots=True)
class Runs:
    """One model, measured in its present state."""

    report: Report
    plan: Plan
    model: PreTrainedModel
    forced: ForcedRouting

    def row(self, variant: str, format: str, budget: float, new_tokens: int | None = None) -> None:
        """Times to first token, then decode speed; the cache is warm with the tokens before."""
        if perf_counter() > self.report.deadline:
            self.report.data["skipped"].append(f"{variant} {format} {budget}")
            return
        new_tokens = new_tokens or self.plan.new_tokens
        self.forced.restart()
        generate_greedily(self.model, self._prompt(self.plan.prompts[0]), min(self.plan.warm_tokens, new_tokens + 2))
        first = {}
        for length in self.plan.prompts[1:]:
            generation = generate_greedily(self.model, self._prompt(length), 2)
            first[f"ttft_{length}_s"] = generation.first_token_s
        if moebius.is_patched(self.model):
            moebius.reset_stats(self.model)
        generation = generate_greedily(self.model, self._prompt(self.plan.prompts[0]), new_tokens)
        first[f"ttft_{self.plan.prompts[0]}_s"] = generation.first_token_s
        step = float(np.median(generation.step_s))
        extra = self._parts(step, new_tokens) if moebius.is_patched(self.model) else {}
        self.report.add(
            part="model", variant=variant, format=format, budget=budget, decode_tok_s=generation.decode_tok_s,
            step_ms=step * 1e3, **first, **extra,
        )  # fmt: skip

    def fetch_only(self, format: str, budget: float) -> None:
        """Every miss crosses the link and is computed on the device."""
        [runtime] = runtimes(self.model)
        tier = runtime.tiers[0]
        former, tier.costs = tier.costs, FetchAll(tier.costs.cpu, tier.costs.gpu, tier.costs.upload_us)
        try:
            self.row("fetch only", format, budget)
        finally:
            tier.costs = former

    def accelerate(self, budget: float) -> None:
        """What device_map offers in the same memory: layers that do not fit cross the link for each token."""
        from accelerate import dispatch_model, infer_auto_device_map

        self.model.to("cpu")
        torch.cuda.empty_cache()
        experts = sum(p.nbytes for name, p in self.model.named_parameters() if "experts" in name)
        rest = sum(p.nbytes for p in self.model.parameters()) - experts
        memory = {self.report.device.index: int(experts * budget + rest), "cpu": 1 << 40}
        layers = ["Qwen3MoeDecoderLayer"]
        places = infer_auto_device_map(self.model, memory, no_split_module_classes=layers)
        places |= {"model.embed_tokens": self.report.device.index, "lm_head": self.report.device.index}
        self.model = dispatch_model(self.model, places)
        self.row("accelerate", "bf16", budget, new_tokens=4)

    def _parts(self, step: float, new_tokens: int) -> dict[str, Any]:
        """What the processors and the link did per step, and the same step with empty experts."""
        sums = moebius.stats(self.model).to_dict()
        per_step = {n: sums[n] / new_tokens for n in ("cpu_ms", "gpu_ms", "wait_ms", "uploads", "demand_fetches")}
        per_step["link_ms"] = sums["copy_us"] / 1e3 / new_tokens
        self.forced.empty = True
        try:
            empty = generate_greedily(self.model, self._prompt(self.plan.prompts[0]), 8)
        finally:
            self.forced.empty = False
        longest = max(per_step[name] for name in ("cpu_ms", "gpu_ms", "link_ms"))
        empty_ms = float(np.median(empty.step_s)) * 1e3
        return {
            "hit_rate": sums["hit_rate"], "costs": sums["costs"], "per_step": per_step, "empty_ms": empty_ms,
            "over_bound": (step * 1e3 - empty_ms) / longest if longest else None,
        }  # fmt: skip

    def _prompt(self, tokens: int) -> torch.Tensor:
        size = self.model.config.vocab_size
        return torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
