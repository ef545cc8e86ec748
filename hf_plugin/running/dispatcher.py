"""Split one layer's work between the processors: hits where they are cached, misses on the CPU at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import Timed
from moebius.hf_plugin.running.crossing import send, to_host, zeros
from moebius.hf_plugin.running.streaming import DeviceShare, Launched
from moebius.hf_plugin.running.timeline import CPU, DEVICE, LAYERS
from moebius.kernels.routes import Routes, select, sort_routes
from moebius.predictors.costs import Assignment, CostModel

if TYPE_CHECKING:
    from moebius.hf_plugin.running.layer import PatchedLayer
    from moebius.hf_plugin.running.lookahead import Question
    from moebius.hf_plugin.running.runtime import ModelRuntime


UNCOUNTED = 16  # launches whose times are asked for together


class Ran(NamedTuple):
    """What is left of a launch whose time is not counted yet: not its result."""

    layer: int
    completion: Timed
    slots: np.ndarray  # as `Launched` has them
    tokens: np.ndarray


@dataclass(slots=True)
class Tier:
    """One device's share of a model: its cache, where that is, and what experts cost there and on the CPU."""

    cache: ExpertCache
    device: torch.device
    costs: CostModel
    launches: deque[Ran] = field(default_factory=deque)  # in order, until their time is counted
    shrunk: int = 0  # how often, since the device had no memory for others

    def observe_copies(self) -> None:
        """Let the cost of an upload follow the link, by the copies that have completed meanwhile, and the price it."""
        times = self.cache.copy_times()
        if not self.cache.device.real_link:
            return
        for took_us in times:
            self.costs.observe_upload(took_us)
        if times:
            self.cache.price = self.costs.price

    def observe_cpu(self, tokens: np.ndarray, took_us: float, fetched: int) -> None:
        """Let the CPU's cost, or the factor of its slowdown, follow a call beside the copies of `fetched` experts.

        Where the link is none, what a copy costs is made up, and such a call says nothing of a slowdown.
        """
        if self.cache.device.real_link or not fetched:
            self.costs.observe_cpu(tokens, took_us, fetched * self.costs.upload_us)

    def observe_launch(self, ran: Ran, took_us: float) -> None:
        """Let the cost of experts on the device follow a launch; the emulated device's own speed means nothing."""
        if self.device.type != "cpu":
            self.costs.gpu.observe(ran.tokens[ran.slots >= 0], took_us)


class Step(NamedTuple):
    """One call of a layer, as both processors need it."""

    x: torch.Tensor  # [T, H] where the model computes
    host_x: torch.Tensor  # the same in host memory
    ids: torch.Tensor  # [T, k] in host memory
    routes: Routes
    question: Question | None  # about the next layer


def run_layer(
    runtime: ModelRuntime, layer: PatchedLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the routed experts' outputs, [T, H] on x's device in x's dtype.

    Args:
        x: hidden states [T, H].
        ids: integer [T, k]; -1 and E mean no expert.
        weights: float [T, k].

    Raises:
        ValueError: ids outside -1..E.
    """
    begun = perf_counter()
    tier, lookahead = runtime.tiers.get(layer.index), runtime.lookahead
    question = None if lookahead is None else lookahead.ask(layer.index, x, tier)
    host_x, host_ids, host_weights, *answer = _cross(tier, [x, ids, weights, *(question.asked if question else ())])
    if question is not None and answer:
        question = question._replace(asked=tuple(answer))
    routes = sort_routes(host_ids, host_weights, layer.store.num_experts)
    step = Step(x, host_x, host_ids, routes, question)
    if runtime.recorder is not None:
        runtime.recorder.record(layer.index, host_ids.numpy(), host_weights.float().numpy())
    counters = runtime.counters[layer.index]
    counters.tokens += layer.tokens(x.shape[0])
    hits, misses = counters.hits, counters.misses
    layer.gate.settle(x, ids)
    result = _on_cpu_alone(runtime, layer, step) if tier is None else _on_both(runtime, tier, layer, step)
    if runtime.timeline is not None:
        facts = {"hits": counters.hits - hits, "misses": counters.misses - misses, "tokens": x.shape[0]}
        runtime.timeline.add(LAYERS, layer.name, begun, perf_counter(), layer=layer.index, **facts)
    return result


def _on_cpu_alone(runtime: ModelRuntime, layer: PatchedLayer, step: Step) -> torch.Tensor:
    runtime.counters[layer.index].misses += len(step.routes.tokens)
    out = zeros(step.host_x, step.x.device)
    question = step.question  # there is one where experts are in a file, from which this step's are read first
    foresee = _nothing if question is None else partial(_foresee, runtime, question, layer.index, step.ids)
    _on_cpu(runtime, layer, step.host_x, step.routes, out, foresee)
    return send(out, step.x.device).to(step.x.dtype)


def _cross(tier: Tier | None, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in host memory until the next step, through the buffers that the cache's device keeps for that."""
    buffers = None if tier is None else tier.cache.buffers
    if tier is not None and buffers is not None and tensors[0].device == tier.device:
        return buffers.to_host(tensors)
    return to_host(*tensors)


def _on_both(runtime: ModelRuntime, tier: Tier, layer: PatchedLayer, step: Step) -> torch.Tensor:
    index, routes, counters = layer.index, step.routes, runtime.counters[layer.index]
    cache = tier.cache.layer(index)
    try:
        slots = cache.lookup(routes.experts)
        wanted = tier.costs.assign(routes, slots)
        counters.hits += wanted.hits
        counters.misses += len(routes.tokens) - wanted.hits
        share = DeviceShare(cache, step.x.to(tier.device), routes, slots, wanted)
        if runtime.lookahead is not None:
            runtime.lookahead.missed(len(wanted.absent))
        if step.question is not None:
            _foresee(runtime, step.question, index, step.ids)
        cache.used(routes.experts, wanted.there)  # while the device computes
        out = _on_cpu_meanwhile(runtime, tier, layer, step, share, wanted)
        merged = _merge(runtime, tier, index, share.launched, out, step.x)
    finally:
        cache.finish()
    if len(wanted.absent):
        left = routes.experts[~(wanted.there | share.fetched)] if len(wanted.fetches) else wanted.absent
        cache.admit(left)
    tier.observe_copies()
    return merged


def _on_cpu_meanwhile(
    runtime: ModelRuntime, tier: Tier, layer: PatchedLayer, step: Step, share: DeviceShare, wanted: Assignment
) -> torch.Tensor | None:
    """The sum over what the device does not compute, fp32 [T, H]; None where that is nothing.

    Where fetched experts wait for their turn, the device is looked after between parts of the work.
    """
    mine, took = wanted.on_cpu, 0.0
    if share.launched and not share.waiting and not len(mine.experts):
        return None  # and nothing to send back
    buffers = tier.cache.buffers
    out = zeros(step.host_x, tier.device) if buffers is None else buffers.zeros(*step.host_x.shape)
    tokens = mine.counts
    for part in _parts(tier, mine, tokens) if share.waiting else [mine]:
        took += _on_cpu(runtime, layer, step.host_x, part, out)
        if share.waiting:
            share.advance()
    if len(left := share.finish()):
        part = select(step.routes, np.isin(np.arange(len(wanted.tokens)), left))
        tokens = np.concatenate([tokens, wanted.tokens[left]])
        took += _on_cpu(runtime, layer, step.host_x, part, out)
    if took:
        fetched = int(np.count_nonzero(share.fetched)) if len(wanted.fetches) else 0
        tier.observe_cpu(tokens, took * 1e6, fetched)
    return out


def _parts(tier: Tier, routes: Routes, tokens: np.ndarray) -> Iterator[Routes]:
    """Cut routes with so many `tokens` of each expert where the CPU has computed for as long as an upload takes."""
    ends = np.cumsum(tier.costs.cpu.of(tokens)) // max(tier.costs.upload_us, 1.0)
    for number in np.unique(ends):
        yield select(routes, ends == number)


def _nothing() -> None:
    pass


def _on_cpu(
    runtime: ModelRuntime,
    layer: PatchedLayer,
    x: torch.Tensor,
    routes: Routes,
    out: torch.Tensor,
    meanwhile: Callable[[], None] = _nothing,
) -> float:
    """Add the experts of `routes` to `out`; the seconds that took, and `meanwhile` with it."""
    if not len(routes.experts):
        meanwhile()
        return 0.0
    begun = perf_counter()
    runtime.on_cpu(layer, x, routes, out, meanwhile)
    took = perf_counter() - begun
    runtime.counters[layer.index].cpu_ms += took * 1e3
    if runtime.timeline is not None:
        facts = {"layer": layer.index, "experts": len(routes.experts), "pairs": len(routes.tokens)}
        runtime.timeline.add(CPU, layer.name, begun, begun + took, **facts)
    return took


def _merge(
    runtime: ModelRuntime, tier: Tier, index: int, launched: list[Launched], out: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    buffers = tier.cache.buffers
    if out is not None and buffers is not None:
        out = buffers.to_device(out)
    if not launched:
        assert out is not None
        return out.to(x.device, x.dtype, copy=buffers is not None)
    begun = perf_counter()
    on_device = launched[-1].launch.result()
    waited = perf_counter() - begun
    runtime.counters[index].wait_ms += waited * 1e3
    if runtime.timeline is not None:
        runtime.timeline.add(LAYERS, "wait", begun, begun + waited, layer=index)
        for one in launched:
            facts = {"layer": index, "experts": len(one.computed), "pairs": int(one.computed.sum())}
            runtime.timeline.watch(DEVICE, f"layer {index}", one.launch.completion, **facts)
    for one in launched:
        tier.launches.append(Ran(index, one.launch.completion, one.slots, one.tokens))
    if len(tier.launches) >= UNCOUNTED:
        runtime.count_launches(tier)
    if out is None:
        return on_device.to(x.device, x.dtype)
    total = torch.empty_like(x, device=on_device.device)
    total = torch.add(on_device, out, out=total)  # rounds once, at the end
    return total.to(x.device)


def _foresee(runtime: ModelRuntime, question: Question, index: int, ids: torch.Tensor) -> None:
    assert runtime.lookahead is not None
    runtime.lookahead.foresee(question, index, ids.numpy(), runtime.tiers.get(index + 1))
