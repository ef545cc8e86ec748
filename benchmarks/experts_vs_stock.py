"""One MoE layer on the CPU: our experts in every format beside transformers' own in bf16, in turn, as ratios.

    python benchmarks/experts_vs_stock.py --out benchmarks/results/experts_vs_stock.json

Blocks of calls alternate between the variants, so that all of them see the same machine; random ids at each call.
Stock is `Qwen3MoeExperts` in its fastest implementation for the CPU, ``grouped_mm``. MOEBIUS_ISA limits our kernels
only; torch and its oneDNN have limits of their own, and a record says which there were:

    MOEBIUS_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/experts_vs_stock.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.tools import machine
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.packing import pack
from moebius.kernels.routes import build_routes

LIMITS = "MOEBIUS_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"  # of instruction sets
MIXED = 0  # in the place of a number of tokens
_HOT = 500  # tokens of the mixed batch that share top-k experts
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def stock(experts: int, hidden: int, intermediate: int, top_k: int) -> Qwen3MoeExperts:
    """The layer of transformers, with weights of the usual size."""
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    layer = Qwen3MoeExperts(config).bfloat16()
    for parameter in layer.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def ours(layer: Qwen3MoeExperts, format: str, executor: CpuExecutor) -> Call:
    """The same weights in a store, called as the dispatcher calls them."""
    experts, width, hidden = layer.gate_up_proj.shape
    spec = ExpertSpec(hidden, width // 2)
    store = ExpertStore.empty(spec, RecordLayout.of(spec, format), experts)
    gate, up = layer.gate_up_proj.data.chunk(2, dim=1)
    for expert in range(experts):
        weights = {"gate": gate[expert], "up": up[expert], "down": layer.down_proj.data[expert]}
        pack(store.layout, store.records[expert], weights)

    def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape)
        executor.run(store, x, build_routes(ids.numpy(), weights.float().numpy(), experts), out)
        return out.to(x.dtype)

    return call


def draw(experts: int, tokens: int, top_k: int) -> torch.Tensor:
    """Random ids [T, k]; for MIXED, 500 tokens on k of the experts and one on each of the others."""
    if tokens != MIXED:
        return torch.rand(tokens, experts).topk(top_k).indices
    order = torch.randperm(experts)
    return torch.cat([order[:top_k].expand(_HOT, top_k), order[top_k:].view(-1, top_k)])


def measure(variants: dict[str, Call], shape: tuple[int, int, int, int], tokens: int, blocks: int) -> dict[str, list]:
    """Milliseconds of every call, by variant; the first block warms up."""
    experts, hidden, _, top_k = shape
    per_block = max(1, 16 // (tokens or _HOT))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for block in range(blocks + 1):
        for name, call in variants.items():
            for repeat in range(per_block + 1):
                ids = draw(experts, tokens, top_k)
                x, weights = torch.randn(len(ids), hidden).bfloat16(), torch.rand(ids.shape).bfloat16()
                begun = perf_counter()
                call(x, ids, weights)
                if block and repeat:  # the first call of a block meets the other variant's threads, still spinning
                    times[name].append((perf_counter() - begun) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="128,2048,768,8", help="experts, hidden, intermediate, top-k")
    parser.add_argument("--tokens", default="1,4,32,256", help="0: one token on most experts, 500 on each of top-k")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    experts, hidden, intermediate, top_k = (int(part) for part in arguments.shape.split(","))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layer, executor = stock(experts, hidden, intermediate, top_k), CpuExecutor(arguments.threads, beside_torch=True)
    variants: dict[str, Call] = {"stock bf16": layer}
    variants |= {format: ours(layer, format, executor) for format in arguments.formats.split(",")}
    rows = []
    with torch.inference_mode():
        for tokens in (int(part) for part in arguments.tokens.split(",")):
            times = measure(variants, (experts, hidden, intermediate, top_k), tokens, arguments.blocks)
            reference = median(times["stock bf16"])
            for name, found in times.items():
                middle, ordered = median(found), sorted(found)
                row = {"tokens": tokens, "variant": name, "median_ms": middle, "calls": len(found)}
                row |= {"p20_ms": ordered[len(found) // 5], "p80_ms": ordered[-1 - len(found) // 5]}
                rows.append(row | {"times_stock": reference / middle})
                print(f"{tokens:5} tokens  {name:10}  {middle:8.2f} ms  {reference / middle:5.2f} x stock", flush=True)
    if arguments.out:
        facts = {"shape": arguments.shape, "threads": arguments.threads, "date": date.today().isoformat()}
        facts |= {"processor": machine.cpu().model, "python": platform.python_version()}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
        facts |= {"command": " ".join(["python", *sys.argv]), "isa": machine.compiled_isa()}
        facts |= {"limits": {name: os.environ.get(name) for name in LIMITS}}
        arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
