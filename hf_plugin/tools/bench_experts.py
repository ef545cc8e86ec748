"""`moebius bench experts`: how fast the CPU computes a layer's experts, beside the speed of reading their bytes.

Each call takes what a router gives (ids and weights [T, k], drawn anew for every call) and ends with the layer's
output, so the sorting of routes is inside the measured time. Calls cycle over as many layers as make the packed weights
at least four times the last-level cache, so no weight is found in a cache by luck. Right before each call a plain
multi-threaded read of the same kind of records (another draw of ids, the same buffer) is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.hf_plugin.tools import machine
from moebius.hf_plugin.tools.memory_read import DEFAULT_CACHE_BYTES, RecordReader
from moebius.kernels.experts import ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.formats import coding
from moebius.kernels.packing import pack
from moebius.kernels.reference import expert_forward
from moebius.kernels.routes import build_routes

CACHES = 4  # packed weights are at least this many times the last-level cache
CHECKED_TOKENS = 64  # the float64 reference computes the first tokens only
WARMUP_CALLS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: E experts of hidden width H and intermediate width I, k of them for each token."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "E,H,I,K", such as "128,2048,768,8"."""
        try:
            experts, hidden, intermediate, top_k = (int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"shape {text!r} must be four whole numbers E,H,I,K, such as 128,2048,768,8") from None
        if min(experts, hidden, intermediate, top_k) < 1 or top_k > experts:
            raise ValueError(f"shape {text!r} needs positive numbers, and K at most E")
        return cls(experts, hidden, intermediate, top_k)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; gigabytes are 1e9 bytes, each distinct expert's bytes are counted once per call."""

    format: str
    tokens: int
    threads: int
    isa: str
    layers: int
    calls: int
    median_us: float
    p20_us: float
    p80_us: float
    gbytes_per_s: float
    tflops: float
    stream_gbytes_per_s: float
    rel_error: float


class RandomExperts:
    """Weights drawn in bf16, the precision that checkpoints come in; any expert's can be drawn again.

    Every expert takes a window of its own from one pool of random values: drawing a gigabyte of them takes seconds.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._size = 3 * shape.hidden * shape.intermediate
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(2 * self._size, generator=generator).to(torch.bfloat16)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's unquantised weights, bf16, scaled so that outputs have the inputs' magnitude."""
        h, i = self.shape.hidden, self.shape.intermediate
        start = (7919 * (layer * self.shape.experts + expert)) % self._size
        gate, up, down = self._pool[start : start + self._size].split([i * h, i * h, h * i])
        narrow, wide = 2.0 ** round(np.log2(h) / -2), 2.0 ** round(np.log2(i) / -2)  # powers of 2 round nothing
        return ExpertWeights(
            (gate * narrow).view(i, h), (up * narrow).view(i, h), (down * wide).view(h, i), None, None, None
        )


def run(
    shape: Shape,
    tokens: list[int],
    formats: list[str],
    threads: int | None = None,
    layers: int | None = None,
    repeats: int | None = None,
    progress: Callable[[str, float], None] = lambda _step, _done: None,
) -> Iterator[Row]:
    """Measure every format with every number of tokens.

    Args:
        tokens: numbers of tokens T per call.
        formats: expert formats, of `FORMATS`, or spelt out (see `moebius.kernels.formats`).
        threads: of the computation and of the plain read; None for the physical cores.
        layers: None for as many as make the weights four times the last-level cache; fewer are refused.
        repeats: measured calls per row; None for 200 at one token down to 10 at many.
        progress: called with a step's name and the fraction of it that is done.

    Raises:
        ValueError: an unknown format, or fewer layers than an honest figure needs.
    """
    for format in formats:
        coding(format)  # raises where there is none
    cpu = machine.cpu()
    threads = threads or min(cpu.physical_cores, cpu.usable_cores)
    spec, source = ExpertSpec(shape.hidden, shape.intermediate), RandomExperts(shape)
    executor = CpuExecutor(threads, beside_torch=True)
    try:
        for format in formats:
            layout = RecordLayout.of(spec, format)
            count = _count_layers(layout.nbytes * shape.experts, cpu, layers)
            stores = _pack(spec, layout, source, count, progress)
            for number in tokens:
                yield _measure(executor, stores, source, number, repeats or max(10, 200 // number), progress)
    finally:
        executor.close()


def _count_layers(layer_bytes: int, cpu: machine.Cpu, asked: int | None) -> int:
    cache = cpu.last_level_bytes or DEFAULT_CACHE_BYTES
    needed = -(-CACHES * cache // layer_bytes)
    if asked is not None and asked < needed:
        raise ValueError(
            f"{asked} layers of {layer_bytes / 1e6:.1f} MB fit too well into the last-level cache of {cache / 1e6:.0f} "
            f"MB: an honest figure needs {needed} or more (leave --layers out)"
        )
    return asked or needed


def _pack(
    spec: ExpertSpec, layout: RecordLayout, source: RandomExperts, layers: int, progress: Callable[[str, float], None]
) -> list[ExpertStore]:
    """Fill one store per layer."""
    stores = [ExpertStore.empty(spec, layout, source.shape.experts) for _ in range(layers)]
    for layer, store in enumerate(stores):
        for expert in range(store.num_experts):
            weights = source.weights(layer, expert)._asdict()
            pack(layout, store.records[expert], {name: w for name, w in weights.items() if w is not None})
            progress(f"packing {layout.format}", (layer + (expert + 1) / store.num_experts) / layers)
    return stores


def _draw(random: np.random.Generator, shape: Shape, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random routing of `tokens` tokens: distinct ids int64 [T, k], and weights float32 [T, k] that sum to 1."""
    ids = random.random((tokens, shape.experts)).argpartition(shape.top_k - 1, axis=1)[:, : shape.top_k]
    weights = random.random((tokens, shape.top_k), np.float32) + np.float32(0.1)
    return ids, weights / weights.sum(1, keepdims=True)


def _measure(
    executor: CpuExecutor,
    stores: list[ExpertStore],
    source: RandomExperts,
    tokens: int,
    repeats: int,
    progress: Callable[[str, float], None],
) -> Row:
    shape, layout, random = source.shape, stores[0].layout, np.random.default_rng(0)
    inputs = torch.bfloat16 if layout.quantized else layout.dtype  # what a model computes in
    x = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(1)).to(inputs)
    out = torch.zeros(tokens, shape.hidden)
    times, speeds, stream_speeds, error = [], [], [], 0.0
    with RecordReader(executor.threads, beside_torch=True) as reader:
        for call in range(-WARMUP_CALLS, repeats):
            layer = call % len(stores)
            store = stores[layer]
            rows = np.unique(_draw(random, shape, tokens)[0])
            read_seconds, _ = reader.read(store.records.numpy().view(np.uint64), rows)
            ids, weights = _draw(random, shape, tokens)
            out.zero_()
            started = time.perf_counter()
            routes = build_routes(ids, weights, shape.experts)
            executor.run(store, x, routes, out)
            seconds = time.perf_counter() - started
            if call == -WARMUP_CALLS:
                error = _relative_error(store.spec, source, layer, x, ids, weights, out)
            elif call >= 0:
                times.append(seconds)
                speeds.append(len(routes.experts) * layout.nbytes / seconds / 1e9)
                stream_speeds.append(len(rows) * layout.nbytes / read_seconds / 1e9)
            progress(f"{layout.format}, {tokens} tokens", (call + WARMUP_CALLS + 1) / (repeats + WARMUP_CALLS))
    low, middle, high = (float(value) for value in np.percentile(times, [20, 50, 80]))
    flops = 2 * 3 * shape.hidden * shape.intermediate * shape.top_k * tokens
    return Row(
        format=layout.format,
        tokens=tokens,
        threads=executor.threads,
        isa=machine.compiled_isa(),
        layers=len(stores),
        calls=repeats,
        median_us=round(middle * 1e6, 2),
        p20_us=round(low * 1e6, 2),
        p80_us=round(high * 1e6, 2),
        gbytes_per_s=round(median(speeds), 3),
        tflops=round(flops / middle / 1e12, 5),
        stream_gbytes_per_s=round(median(stream_speeds), 3),
        rel_error=error,
    )


def _relative_error(
    spec: ExpertSpec,
    source: RandomExperts,
    layer: int,
    x: torch.Tensor,
    ids: np.ndarray,
    weights: np.ndarray,
    out: torch.Tensor,
) -> float:
    """||out - reference|| / ||reference|| of the first tokens, in float64 on the unquantised weights."""
    n = min(len(x), CHECKED_TOKENS)
    reference = torch.zeros(n, x.shape[1], dtype=torch.float64)
    routes = build_routes(ids[:n], weights[:n], source.shape.experts)
    for i, expert in enumerate(routes.experts):
        pairs = slice(int(routes.offsets[i]), int(routes.offsets[i + 1]))
        tokens, scale = torch.from_numpy(routes.tokens[pairs]).long(), torch.from_numpy(routes.weights[pairs])
        y = expert_forward(spec, source.weights(layer, int(expert)), x[tokens].double())
        reference.index_add_(0, tokens, y * scale[:, None])
    return float((out[:n].double() - reference).norm() / reference.norm())
