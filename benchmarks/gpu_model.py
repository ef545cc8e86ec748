"""Whole models for `gpu.py`: gpt-oss-20b's expert shape, random weights, the routing of real text in every variant."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch as replaced

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

import moebius
from moebius.hf_plugin.patching import runtimes
from moebius.hf_plugin.running.timeline import LAYERS, Slice, write_trace
from moebius.hf_plugin.tools.generation import generate_greedily
from moebius.hf_plugin.tools.overlap import Overlap, traced
from moebius.kernels import packing
from moebius.kernels.routes import Routes
from moebius.predictors.costs import Assignment, CostModel

try:
    from benchmarks.gpu_report import Report
except ModuleNotFoundError:  # run as a script
    from gpu_report import Report  # type: ignore[import-not-found,no-redef]

TRACE = Path(__file__).parents[1] / "tests" / "data" / "traces" / "gpt_oss_20b_excerpt.npz"
BUDGETS = (1.0, 0.25, 0.5, 0.125, 0.75)  # the most telling first, in case time runs out
TRACED = 0.25  # the budget whose timeline is written down


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
    traced_tokens: int


FULL = Plan(24, 32, 2880, 2880, 64, (128, 2048), 64, 48, 24)
TINY = Plan(2, 4, 32, 16, 2, (4, 9), 3, 4, 3)


class ForcedRouting:
    """Replaces what the routers choose by the rows of a trace, one row for each token of each layer, round and round.

    Args:
        ids: [T, L, k].
        weights: of each of them, the same shape.
    """

    def __init__(self, model: PreTrainedModel, ids: np.ndarray, weights: np.ndarray) -> None:
        self.length, twice = len(ids), (2, 1, 1)  # so that no slice of up to T rows has to be put together
        self.ids = torch.from_numpy(np.tile(ids, twice).astype(np.int64)).to(model.device)
        self.weights = torch.from_numpy(np.tile(weights, twice)).to(model.device, model.dtype)
        self.rows = [0] * ids.shape[1]
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.forward = self._router(number, layer.mlp.gate.num_experts)

    def restart(self) -> None:
        self.rows = [0] * len(self.rows)

    def _router(self, number: int, experts: int) -> Any:
        def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            tokens = hidden_states.numel() // hidden_states.shape[-1]
            row = self.rows[number] % self.length
            self.rows[number] = row + tokens
            logits = torch.zeros(tokens, experts, dtype=hidden_states.dtype, device=self.ids.device)
            return logits, self.weights[row : row + tokens, number], self.ids[row : row + tokens, number]

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


def read_routing(path: str | Path, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Recorded ids [T, L, k] and weights that add up to 1, equal ones where the trace has none; T suits the prompts."""
    with np.load(path) as archive:
        ids = archive["ids"]
        weights = archive["probs"].astype(np.float32) if "probs" in archive else np.ones(ids.shape, np.float32)
    if ids.shape[1] != plan.layers or ids.max() >= plan.experts:
        raise ValueError(f"the trace is of {ids.shape[1]} layers and {ids.max() + 1} experts; {plan} is measured")
    rounds = (-(-2 * max(plan.prompts) // len(ids)), 1, 1)
    return np.tile(ids, rounds), np.tile(weights / weights.sum(-1, keepdims=True), rounds)


def random_routing(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The same, of no text."""
    rng, k = np.random.default_rng(0), min(4, plan.experts // 2)
    ids = rng.random((200, plan.layers, plan.experts)).argsort(-1)[..., :k]
    return ids, np.full(ids.shape, 1 / k, np.float32)


def _fetch_all(_costs: CostModel, routes: Routes, slots: np.ndarray) -> Assignment:
    """Stands for `CostModel.assign`: every miss is fetched, none is computed on the CPU."""
    return Assignment.where(np.ones(len(slots), bool), routes, slots)


def measure_model(report: Report, format: str, trace: str | None, dry: bool) -> None:
    """Stock (with bf16 only), patched at all budgets, fetch only, and CPU only."""
    with opened(report, trace, dry) as run:
        if format == "bf16":
            run.row("stock", format, 1.0)
        expected = run.logits() if format == "bf16" else None
        options = {"device": "emulated" if dry else str(report.device), "gpu_memory": 1.0, "expert_format": format}
        begun = perf_counter()
        with patched(run.model, **options):
            seconds, notes = perf_counter() - begun, moebius.stats(run.model).notes
            report.add(part="patch", format=format, seconds=seconds, notes=notes)
            for budget in BUDGETS:
                moebius.resize(run.model, gpu_memory=budget)
                run.row("moebius", format, budget, expected)
                if budget < 1:
                    with replaced.object(CostModel, "assign", _fetch_all):
                        run.row("fetch only", format, budget)
            with on_cpu(run.model):
                run.row("cpu", format, 0.0, expected)


def measure_accelerate(report: Report, trace: str | None, dry: bool, budget: float = TRACED) -> None:
    """What device_map offers in the same memory: layers that do not fit cross the link for each token."""
    if dry:
        return  # there is no device to offload from
    from accelerate import dispatch_model, infer_auto_device_map

    with opened(report, trace, dry) as run:
        run.model.to("cpu")
        torch.cuda.empty_cache()
        experts = sum(p.nbytes for name, p in run.model.named_parameters() if "experts" in name)
        rest = sum(p.nbytes for p in run.model.parameters()) - experts
        memory = {report.device.index: int(experts * budget + rest), "cpu": 1 << 40}
        places = infer_auto_device_map(run.model, memory, no_split_module_classes=["Qwen3MoeDecoderLayer"])
        places |= {"model.embed_tokens": report.device.index, "lm_head": report.device.index}
        run.model = dispatch_model(run.model, places)
        run.row("accelerate", "bf16", budget, new_tokens=3)


@contextmanager
def opened(report: Report, trace: str | None, dry: bool) -> Iterator[Runs]:
    """A model of its own for each part, which takes seconds to make and nothing from a part that failed."""
    plan = TINY if dry else FULL
    ids, weights = random_routing(plan) if dry else read_routing(trace or TRACE, plan)
    begun = perf_counter()
    model = build(plan, ids.shape[2], report.device)
    implementation = getattr(model.config, "_experts_implementation", None)
    report.add(part="build", seconds=perf_counter() - begun, stock_experts=implementation)
    run = Runs(report, plan, model, ForcedRouting(model, ids, weights))
    del model
    try:
        yield run
    finally:
        del run.model, run.forced
        gc.collect()


@contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[None]:
    """The originals stay where they are, so that nothing is copied back; recorded ids cannot be foreseen by gates, so
    that prefetching by them would only cost; and quantised experts all get the codes of the first, since making them
    takes minutes and no time depends on their values."""
    with ExitStack() as undo:
        undo.enter_context(replaced.object(packing, "quantize", _quantized_once()))
        moebius.patch(model, predictor="none", keep_original=True, **options)
        undo.callback(moebius.unpatch, model)
        yield


def _quantized_once() -> Any:
    quantize, known = packing.quantize, dict[Any, Any]()

    def once(matrix: torch.Tensor, bits: int) -> Any:
        key = (matrix.shape, bits)
        if key not in known:
            known[key] = tuple(part.cpu() for part in quantize(matrix, bits))
        return known[key]

    return once


@contextmanager
def on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """All experts are computed on the CPU, as with device="cpu"; the rest of the model stays where it is."""
    [runtime] = runtimes(model)
    former, runtime.tiers = runtime.tiers, {}
    try:
        yield
    finally:
        runtime.tiers = former


@dataclass(slots=True)
class Runs:
    """One model, measured in its present state."""

    report: Report
    plan: Plan
    model: PreTrainedModel
    forced: ForcedRouting

    def row(
        self,
        variant: str,
        format: str,
        budget: float,
        expected: torch.Tensor | None = None,
        new_tokens: int | None = None,
    ) -> None:
        """Times to first token, then decode speed; the cache is warm with the tokens before.

        Args:
            expected: stock's logits, for the error of this variant's.
        """
        if perf_counter() > self.report.deadline:
            self.report.data["skipped"].append(f"{variant} {format} {budget}")
            return
        short, *longer = self.plan.prompts
        new_tokens = new_tokens or self.plan.new_tokens
        self.forced.restart()
        generate_greedily(self.model, self._prompt(short), min(self.plan.warm_tokens, new_tokens))
        found: dict[str, Any] = {}
        for length in longer if variant != "fetch only" else ():
            found[f"ttft_{length}_s"] = generate_greedily(self.model, self._prompt(length), 2).first_token_s
        generation = generate_greedily(self.model, self._prompt(short), new_tokens)
        found |= {f"ttft_{short}_s": generation.first_token_s, "decode_tok_s": generation.decode_tok_s}
        found["step_ms"] = float(np.median(generation.step_s)) * 1e3
        if expected is not None:
            found["logits_error"] = float((self.logits() - expected).norm() / expected.norm())
        if variant in ("moebius", "fetch only"):
            found |= self._overlap(f"{variant} {format} {budget}", budget)
        self.report.add(part="model", variant=variant, format=format, budget=budget, **found)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of a few tokens, on the host."""
        self.forced.restart()
        ids = self._prompt(min(16, self.plan.prompts[0])).to(self.model.device)
        return self.model(input_ids=ids).logits.float().cpu()

    def _overlap(self, name: str, budget: float) -> dict[str, Any]:
        """What the processors and the link did in each step, from a timeline of another generation."""
        slices, overlap = traced(self.model, self._prompt(self.plan.prompts[0]), self.plan.traced_tokens)
        out = self.report.out
        if budget == TRACED and out is not None:
            write_trace(out.with_name(f"{out.stem}_{name.replace(' ', '_')}.trace.json"), {name: slices})
        costs = moebius.stats(self.model).to_dict()["costs"]
        facts = {"hit_rate": _hit_rate(slices), "over_bound": overlap.over_bound}
        return facts | {"per_step": _parts(overlap), "costs": costs}

    def _prompt(self, tokens: int) -> torch.Tensor:
        size = self.model.config.vocab_size
        return torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _hit_rate(slices: list[Slice]) -> float | None:
    """Of decode steps, not of the prompt."""
    facts = [one.facts for one in slices if one.track == LAYERS and one.facts.get("tokens") == 1]
    hits, misses = (sum(fact[name] for fact in facts) for name in ("hits", "misses"))
    return hits / (hits + misses) if hits + misses else None


def _parts(overlap: Overlap) -> dict[str, float]:
    return {name: getattr(overlap, name) for name in ("step_ms", "empty_ms", "cpu_ms", "device_ms", "link_ms")}
