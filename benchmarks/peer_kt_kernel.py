"""One MoE layer on the CPU by kt-kernel, as rows for `peer.py`; in an environment of its own, without Moebius.

    pip install torch==2.13.0 safetensors numpy gguf typer rich pyyaml httpx
    pip install --no-deps kt-kernel==0.7.2
    python benchmarks/peer_kt_kernel.py FORMAT THREADS TOKENS[,TOKENS...] [--shape 128,2048,768,8]

Calls go round as many layers as make the packed weights 480 MB, with random ids in every call. The relative error is
against float64 on the unquantised weights, of the first tokens of one call. Prints one JSON object for each TOKENS.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

import torch
from kt_kernel import kt_kernel_ext

BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}  # of a weight; scales are few
CLASSES = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}
CACHE = 480e6  # bytes


def weights(experts: int, rows: int, columns: int) -> torch.Tensor:
    """bf16 [experts, rows, columns]: four random experts, shifted, since drawing all would take long."""
    drawn = torch.randn(4, rows, columns) * columns**-0.5
    result = torch.empty(experts, rows, columns, dtype=torch.bfloat16)
    for expert in range(experts):
        result[expert] = drawn[expert % 4].roll(expert, 0)
    return result


class Layers:
    """Layers that share their source weights but not what the engine packs of them."""

    def __init__(self, format: str, threads: int, shape: list[int], longest: int) -> None:
        self.experts, self.hidden, self.intermediate, self.top_k = shape
        self.gate = weights(self.experts, self.intermediate, self.hidden)
        self.up = weights(self.experts, self.intermediate, self.hidden)
        self.down = weights(self.experts, self.hidden, self.intermediate)
        self.expert_bytes = int(3 * self.hidden * self.intermediate * BYTES[format])
        self.cpu = kt_kernel_ext.CPUInfer(threads)
        count = -int(-CACHE // (self.experts * self.expert_bytes)) or 1
        self.layers = [self._layer(CLASSES[format], longest) for _ in range(max(count, 2))]

    def _layer(self, name: str, longest: int) -> Any:
        config = kt_kernel_ext.moe.MOEConfig(self.experts, self.top_k, self.hidden, self.intermediate, 0)
        config.max_len, config.pool = max(longest, 1024), self.cpu.backend_
        config.gate_proj, config.up_proj = self.gate.data_ptr(), self.up.data_ptr()
        config.down_proj = self.down.data_ptr()
        config.gate_scale = config.up_scale = config.down_scale = 0
        layer, identity = getattr(kt_kernel_ext.moe, name)(config), torch.arange(self.experts)
        self.cpu.submit(layer.load_weights_task(identity.data_ptr()))
        self.cpu.sync()
        return layer

    def run(self, call: int, ids: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        tokens = torch.tensor([len(x)], dtype=torch.int32)
        addresses = (tensor.data_ptr() for tensor in (ids, scale, x, out))
        layer = self.layers[call % len(self.layers)]
        self.cpu.submit(layer.forward_task(tokens.data_ptr(), self.top_k, *addresses, False))
        self.cpu.sync()

    def exact(self, ids: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output in float64."""
        result = torch.zeros(len(x), self.hidden, dtype=torch.float64)
        for token, chosen in enumerate(ids.tolist()):
            for rank, expert in enumerate(chosen):
                gate, up = (matrix[expert].double() @ x[token].double() for matrix in (self.gate, self.up))
                inner = torch.nn.functional.silu(gate) * up
                result[token] += scale[token, rank] * (self.down[expert].double() @ inner)
        return result


def measure(layers: Layers, tokens: int) -> dict[str, Any]:
    """Median and spread of calls with that many tokens."""
    calls = {1: 300, 4: 120}.get(tokens, 28)
    times, distinct, out = [], 0, torch.empty(tokens, layers.hidden, dtype=torch.bfloat16)
    for call in range(calls + calls // 4):
        ids = torch.rand(tokens, layers.experts).topk(layers.top_k).indices.contiguous()
        scale = torch.softmax(torch.randn(tokens, layers.top_k), -1).contiguous()
        x = torch.randn(tokens, layers.hidden).bfloat16()
        begun = perf_counter()
        layers.run(call, ids, scale, x, out)
        times.append(perf_counter() - begun)
        distinct += len(ids.unique())
    few = slice(0, 4)
    exact = layers.exact(ids[few], scale[few], x[few])
    ordered, read = sorted(times[calls // 4 :]), distinct / len(times) * layers.expert_bytes
    return {
        "tokens": tokens,
        "median_us": round(median(ordered) * 1e6, 1),
        "p20_us": round(ordered[calls // 5] * 1e6, 1),
        "p80_us": round(ordered[-1 - calls // 5] * 1e6, 1),
        "gbytes_per_s": round(read / median(ordered) / 1e9, 2),
        "rel_error": round(float((out[few].double() - exact).norm() / exact.norm()), 4),
        "calls": calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format", choices=CLASSES)
    parser.add_argument("threads", type=int)
    parser.add_argument("tokens")
    parser.add_argument("--shape", default="128,2048,768,8", help="experts, hidden, intermediate, top-k")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    counts = [int(part) for part in arguments.tokens.split(",")]
    shape = [int(part) for part in arguments.shape.split(",")]
    layers = Layers(arguments.format, arguments.threads, shape, max(counts))
    for tokens in counts:
        print(json.dumps(measure(layers, tokens)), flush=True)


if __name__ == "__main__":
    main()
