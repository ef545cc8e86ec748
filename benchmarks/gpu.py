"""One call that measures the GPU tier: kernels against transformers', whole models at several cache budgets, overlap.

    python -m benchmarks.gpu --out benchmarks/results/gpu_NAME.json     # below 10 minutes
    python -m benchmarks.gpu --parts kernels --out ...                  # 2 to 3 minutes, the most telling of it
    python -m benchmarks.gpu --dry-run                                  # tiny, on the emulated device

Rows are written as they come, so that a run which is cut off keeps what it has. A part that raises leaves its traceback
in the results, and the others go on; a run that hangs prints where, and ends. A process computes nothing any more after
an illegal memory access: give parts processes of their own where that may happen. Sweeps keep the fastest tiles, as
`moebius warmup` does, and what runs later uses them: those of `decode` are among the kernels, the others come last.
"""

from __future__ import annotations

import argparse
import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from moebius.gpu_cache.executor import make_executor
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.packing import pack, unpack
from moebius.kernels.reference import moe_forward
from moebius.kernels.routes import Routes, build_routes

try:
    from benchmarks.gpu_model import measure_accelerate, measure_model
    from benchmarks.gpu_report import Report
except ModuleNotFoundError:  # run as a script
    from gpu_model import measure_accelerate, measure_model  # type: ignore[import-not-found,no-redef]
    from gpu_report import Report  # type: ignore[import-not-found,no-redef]

GRACE_S = 50  # after the deadline, for the part that is running
PARTS = ("kernels", "model", "accelerate", "sweep")
FORMATS = ("bf16", "int8", "int4")
SWEPT = {"decode": 1, "batch": 64, "prompt": None}  # tokens of each class, None for those of a long prompt
CHECKED = 2  # tokens of a call that are compared with float64


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; `TINY` only shows that the script runs."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    decode_tokens: tuple[int, ...]
    prefill_tokens: int
    copy_bytes: int
    calls: int  # of a few tokens, with other experts each, so that weights come from memory and not from a cache


FULL = Sizes(128, 2048, 768, 8, (1, 8, 64), 4096, 2 << 30, 48)  # Qwen3-30B-A3B
TINY = Sizes(4, 64, 32, 2, (1, 3), 20, 1 << 20, 2)


def seconds_per_call(calls: list[Callable[[], object]], device: torch.device) -> tuple[float, str]:
    """Device time of one call; all calls in a row in a CUDA graph, where that can be, so that no launch waits."""
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        begun = perf_counter()
        for call in calls:
            call()
        return (perf_counter() - begun) / len(calls), "wall"
    torch.cuda.synchronize()
    how, run_all = "graph", torch.cuda.CUDAGraph()
    try:
        # the outer one brings the stream back where ending the capture raises
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(run_all):
            for call in calls:
                call()
        replay: Callable[[], object] = run_all.replay
    except RuntimeError:  # a call that looks at values on the host cannot be captured
        torch.cuda.synchronize()
        how, replay = "launches", lambda: [call() for call in calls]
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2] / len(calls), how


def measure_copies(report: Report, sizes: Sizes) -> None:
    """Bytes read and written per second by a copy on the device; and uploads from pinned memory."""
    device = report.device
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(sizes.copy_bytes // 8, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device, _ = seconds_per_call([lambda: target.copy_(source)] * 3, device)
    upload, _ = seconds_per_call([lambda: target[: len(host)].copy_(host, non_blocking=True)] * 3, device)
    report.bandwidth = 2 * source.nbytes / on_device
    speeds = {"device_gbytes_per_s": report.bandwidth / 1e9, "upload_gbytes_per_s": host.nbytes / upload / 1e9}
    report.add(part="copies", **speeds)


class Layer:
    """All experts of one layer in slots, in some format."""

    def __init__(self, sizes: Sizes, format: str, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.spec = ExpertSpec(sizes.hidden, sizes.intermediate)
        self.layout = RecordLayout.of(self.spec, format)
        torch.manual_seed(0)
        self.pool = torch.empty(sizes.experts, self.layout.nbytes, dtype=torch.uint8, device=device)
        for expert in range(sizes.experts):
            shapes = self.layout.shapes().items()
            pack(self.layout, self.pool[expert], {n: torch.randn(s, device=device) / s[-1] ** 0.5 for n, s in shapes})

    def step(self, tokens: int, seed: int, first: int | None = None) -> tuple[torch.Tensor, Routes]:
        """Random inputs and routes, of all tokens or of the `first` ones of them."""
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(self.sizes.experts)[: self.sizes.top_k] for _ in range(tokens)])[:first]
        x = torch.randn(tokens, self.sizes.hidden, generator=torch.Generator().manual_seed(seed))[:first]
        weights = np.full(ids.shape, 1 / self.sizes.top_k)
        return x.to(self.device, torch.bfloat16), build_routes(ids, weights, self.sizes.experts)

    def call(self, x: torch.Tensor, routes: Routes, tile: Any = None) -> Callable[[], torch.Tensor]:
        """The layer's kernels with their tables already on the device; on the emulated device the reference.

        Args:
            tile: instead of the one that the plugin would choose.
        """
        slots = routes.experts.astype(np.int32)
        if self.device.type == "cpu":
            run = make_executor(self.spec, self.layout, self.device)
            return lambda: run(self.pool, x, routes, slots)
        from moebius.kernels.triton.choice import tile_for
        from moebius.kernels.triton.config import DecodeTile
        from moebius.kernels.triton.decode import decode
        from moebius.kernels.triton.prefill import prefill
        from moebius.kernels.triton.tables import pair_table, sender, tile_table

        send = sender(self.device)
        table = pair_table(routes, slots, len(x), send)
        tile = tile or tile_for(self.spec, self.layout, len(x), self.device)
        if isinstance(tile, DecodeTile):
            return lambda: decode(self.spec, self.layout, self.pool, x, table, tile)
        tiles = tile_table(routes, slots, tile.pairs, send)
        return lambda: prefill(self.spec, self.layout, self.pool, x, table, tiles, tile)

    def error(self, tokens: int) -> float:
        """||ours - reference|| / ||reference|| in float64, of the first tokens of a call."""
        x, routes = self.step(tokens, 99, CHECKED)
        expected = torch.zeros(x.shape, dtype=torch.float64)
        weights = [unpack(self.layout, self.layout.stored(self.pool[int(expert)].cpu())) for expert in routes.experts]
        moe_forward(self.spec, weights, x.cpu(), routes, expected)
        found = self.call(*self.step(tokens, 99))()[: len(x)]
        return float((found.cpu().double() - expected).norm() / expected.norm())


def measure_kernels(report: Report, sizes: Sizes, format: str) -> None:
    """Decode and prefill with all experts resident: time, bytes of the distinct experts per second, FLOP/s."""
    layer = Layer(sizes, format, report.device)
    for tokens in (*sizes.decode_tokens, sizes.prefill_tokens):
        count = sizes.calls if tokens <= 64 else 4
        steps = [layer.step(tokens, seed) for seed in range(count)]
        took, how = seconds_per_call([layer.call(x, routes) for x, routes in steps], report.device)
        nbytes = np.mean([len(routes.experts) for _, routes in steps]) * layer.layout.nbytes
        flops = 6 * sizes.hidden * sizes.intermediate * tokens * sizes.top_k
        share = nbytes / took / report.bandwidth if report.bandwidth else None
        row = {"us": took * 1e6, "timed": how, "share_of_copy": share, "tflops": flops / took / 1e12}
        row |= {"error": layer.error(tokens)}
        report.add(part="kernel", kernel="moebius", format=format, tokens=tokens, **row)


def measure_rivals(report: Report, sizes: Sizes) -> None:
    """transformers' own experts, bf16, on the same shapes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = {"hidden_size": sizes.hidden, "moe_intermediate_size": sizes.intermediate, "num_experts": sizes.experts}
    with report.device:
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**shape, num_experts_per_tok=sizes.top_k)).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    for name in ("grouped_mm", "batched_mm"):
        forward = ALL_EXPERTS_FUNCTIONS[name]
        for tokens in (*sizes.decode_tokens, sizes.prefill_tokens):
            if name == "batched_mm" and tokens > 64:
                continue  # it copies every pair's weights: 9 MB each
            count = sizes.calls if tokens <= 64 else 4
            calls = [_rival_call(forward, experts, sizes, tokens, seed) for seed in range(count)]
            with torch.no_grad():
                took, how = seconds_per_call(calls, report.device)
            report.add(part="kernel", kernel=name, format="bf16", tokens=tokens, us=took * 1e6, timed=how)


def _rival_call(
    forward: Callable[..., torch.Tensor], experts: torch.nn.Module, sizes: Sizes, tokens: int, seed: int
) -> Callable[[], torch.Tensor]:
    device = next(experts.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, sizes.experts, generator=generator).topk(sizes.top_k).indices.to(device)
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(device, torch.bfloat16)
    weights = torch.full(ids.shape, 1 / sizes.top_k, dtype=torch.bfloat16, device=device)
    return lambda: forward(experts, x, ids, weights)


def sweep_tiles(report: Report, sizes: Sizes, format: str, kind: str) -> None:
    """Time the tiles worth trying for a class of tokens, and keep the fastest for what runs later."""
    if report.device.type == "cpu":
        return  # there are no kernels to try
    from moebius.kernels.triton.choice import Kind, Tile, device_name, keep
    from moebius.kernels.triton.config import built_in
    from moebius.kernels.triton.tuning import measure

    layer, tokens = Layer(sizes, format, report.device), SWEPT[kind] or sizes.prefill_tokens
    steps = [layer.step(tokens, seed) for seed in range(sizes.calls if tokens == 1 else 2)]

    def timer(tile: Tile) -> float:
        return seconds_per_call([layer.call(x, routes, tile) for x, routes in steps], report.device)[0] * 1e6

    key = Kind.of(device_name(report.device), layer.spec, layer.layout, kind)
    found = measure(key, timer)
    keep(key, found[0].tile)
    best, default = [timed.tile._asdict() | {"us": timed.us} for timed in found[:8]], built_in(key.code, kind)._asdict()
    nbytes = np.mean([len(routes.experts) for _, routes in steps]) * layer.layout.nbytes
    share = nbytes / found[0].us * 1e6 / report.bandwidth if report.bandwidth else None
    report.add(part="sweep", format=format, tokens=tokens, share_of_copy=share, built_in=default, best=best)


def profile_launches(report: Report, sizes: Sizes, format: str) -> None:
    """Microseconds of each launch of a call."""
    cuda = report.device.type == "cuda"
    layer = Layer(sizes, format, report.device)
    for tokens in (*sizes.decode_tokens, sizes.prefill_tokens):
        calls = [layer.call(*layer.step(tokens, seed)) for seed in range(3)]
        calls[0]()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
            for call in calls:
                call()
            if cuda:
                torch.cuda.synchronize()
        spent = "self_device_time_total" if cuda else "self_cpu_time_total"
        us = {event.key: getattr(event, spent) / len(calls) for event in recorded.key_averages()}
        longest = sorted(us.items(), key=lambda item: -item[1])[:8]
        report.add(part="launches", format=format, tokens=tokens, us=dict(longest))


def plan(report: Report, sizes: Sizes, trace: str | None, dry: bool) -> dict[str, list[tuple[str, Callable[[], None]]]]:
    """What there is to run, by part, the most wanted first."""
    kernels: dict[str, Callable[[], None]] = {"copies": partial(measure_copies, report, sizes)}
    kernels |= {f"kernels {format}": partial(measure_kernels, report, sizes, format) for format in FORMATS}
    kernels |= {"rivals": partial(measure_rivals, report, sizes)}
    sweeps = {f"sweep {f} {kind}": partial(sweep_tiles, report, sizes, f, kind) for kind, f in product(SWEPT, FORMATS)}
    kernels |= {name: sweeps.pop(name) for name in [*sweeps] if name.endswith("decode")}
    kernels |= {f"launches {format}": partial(profile_launches, report, sizes, format) for format in FORMATS}
    model = {f"model {name}": partial(measure_model, report, name, trace, dry) for name in ("bf16", "int4")}
    accelerate = {"accelerate": partial(measure_accelerate, report, trace, dry)}
    parts = {"kernels": kernels, "model": model, "accelerate": accelerate, "sweep": sweeps}
    return {part: list(steps.items()) for part, steps in parts.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", help="recorded routing (.npz) that models are made to follow; default: the excerpt")
    parser.add_argument("--out", type=Path, help="results as JSON; timelines are written beside it")
    parser.add_argument("--seconds", type=float, default=500, help="no part begins later than this")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the emulated device")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts.split(",")) - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))} is no part; choose of {', '.join(PARTS)}")
    if not chosen.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; use --dry-run")
    faulthandler.dump_traceback_later(chosen.seconds + GRACE_S, exit=True)
    sizes, device = (TINY, torch.device("cpu")) if chosen.dry_run else (FULL, torch.device("cuda", 0))
    report = Report(chosen.out, chosen.seconds, device)
    available = plan(report, sizes, chosen.trace, chosen.dry_run)
    for name, run in [step for part in PARTS if part in chosen.parts.split(",") for step in available[part]]:
        report.part(name, run)
    faulthandler.cancel_dump_traceback_later()
    return report.data


if __name__ == "__main__":
    main()
