"""Any sequence of calls, with copies that end late, out of order or with an error, keeps the cache's promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import Launch
from moebius.gpu_cache.policy import Reason
from moebius.gpu_cache.slots import State
from tests.gpu_cache.fake_device import CopyError, FakeDevice
from tests.gpu_cache.layers import HIDDEN, expected, make_layers, one_token

LAYERS = make_layers((4, 3, 4), (2, 2, 8))  # a pool of two layers, and one of its own
SMALL, LARGE = LAYERS[0].layout.nbytes, LAYERS[2].layout.nbytes
layer_numbers = st.integers(0, len(LAYERS) - 1)
some_experts = st.sets(st.integers(0, 3), min_size=1, max_size=2)


def existing(layer: int, experts: set[int]) -> np.ndarray:
    return np.array(sorted({expert % len(LAYERS[layer].records) for expert in experts}), np.int32)


class Machine(RuleBasedStateMachine):
    """One caller's thread; the fake device is the world outside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of each layer at work: experts, slots
        self.launches: list[tuple[Launch, torch.Tensor, list[Any]]] = []
        self.failures = 0

    @initialize(slots=st.integers(0, 5), flying_bytes=st.sampled_from([0, 1 << 20]))
    def open(self, slots: int, flying_bytes: int) -> None:
        self.device = FakeDevice()
        self.device.flying_bytes = flying_bytes  # 0: two copies at a time
        self.budget = SMALL + LARGE + slots * LARGE // 2
        self.cache = ExpertCache(self.device, LAYERS, self.budget)

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call; an error must be that of a copy which failed before."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            if self.failures == 0 or not isinstance(error.__cause__, CopyError):
                raise
            self.failures = max(0, self.failures - str(error).count("of layer"))
            return None

    @rule(layer=layer_numbers, experts=some_experts, fetch=st.booleans(), arriving=st.integers(0, 2))
    def step(self, layer: int, experts: set[int], fetch: bool, arriving: int) -> None:
        """A layer's step up to its launch, with copies that end between `lookup` and `fetch`."""
        if layer in self.steps:
            self.finish(layer, admit=True)
        wanted = existing(layer, experts)
        slots = self.attempt(self.cache.layer(layer).lookup, wanted)
        if slots is None:
            self.cache.layer(layer).finish()
            return
        self.steps[layer] = wanted, slots
        pool, local = self.cache.layer(layer)._sound, self.cache.layer(layer)._local
        late = [wish.layer for wish in pool._waiting._waiting if wish.reason is Reason.PREFETCH]
        assert local not in late, "a prefetch for a layer that has begun"
        for copy in [copy for copy in self.device.copies if copy.ready][:arriving]:
            copy.end()
        if fetch and (got := self.attempt(self.cache.layer(layer).fetch, wanted[slots < 0])) is not None:
            slots[slots < 0] = got
        self.launch(layer)

    def launch(self, layer: int) -> None:
        experts, slots = self.steps[layer]
        there, x = slots >= 0, torch.linspace(-1, 1, HIDDEN)[None]
        launch = self.attempt(self.cache.layer(layer).launch, x, one_token(experts[there]), slots[there])
        if launch is not None:
            correct = expected(LAYERS[layer], x, experts[there])
            self.launches.append((launch, correct, list(self.device.computations[-1].after)))

    @precondition(lambda self: self.steps)
    @rule(layer=layer_numbers, admit=st.booleans())
    def finish(self, layer: int, admit: bool) -> None:
        if layer not in self.steps:
            return
        experts, slots = self.steps.pop(layer)
        self.cache.layer(layer).used(experts, slots >= 0)
        if admit:
            self.attempt(self.cache.layer(layer).admit, experts[slots < 0])
        self.cache.layer(layer).finish()

    @rule(layer=layer_numbers, experts=some_experts)
    def prefetch(self, layer: int, experts: set[int]) -> None:
        self.attempt(self.cache.layer(layer).prefetch, existing(layer, experts))

    @precondition(lambda self: any(copy.ready for copy in self.device.copies))
    @rule(which=st.integers(0, 9), fail=st.sampled_from([False, False, False, True]))
    def end_a_copy(self, which: int, fail: bool) -> None:
        ready = [copy for copy in self.device.copies if copy.ready]
        ready[which % len(ready)].end(CopyError("injected") if fail else None)
        self.failures += fail

    @precondition(lambda self: self.device.computations and self.device.computations[0].ready)
    @rule()
    def end_a_computation(self) -> None:
        self.device.computations[0].end()

    @precondition(lambda self: self.launches)
    @rule()
    def result(self) -> None:
        launch, correct, copies = self.launches.pop(0)
        try:
            assert torch.equal(launch.result(), correct), "a slot was read before, or after, its expert was there"
        except CopyError:
            if not any(copy.error for copy in copies):
                raise

    @precondition(lambda self: not self.steps)
    @rule(slots=st.integers(0, 5))
    def resize(self, slots: int) -> None:
        self.budget = SMALL + LARGE + slots * LARGE // 2
        self.cache.resize(self.budget)
        self.failures = 0  # a copy into the former slots has no meaning any more

    @rule()
    def drain(self) -> None:
        self.attempt(self.cache.drain)
        assert not self.device.copies

    @invariant()
    def budget_is_kept(self) -> None:
        assert self.cache.nbytes <= self.budget

    @invariant()
    def slots_and_experts_are_paired(self) -> None:
        for pool in self.cache._pools:
            table = pool.table
            occupied = np.flatnonzero(table.key_of >= 0)
            assert (table.slot_of[table.key_of[occupied]] == occupied).all()
            assert (table.slot_of >= 0).sum() == len(occupied)
            assert ((table.visible >= 0) == (table.slot_of >= 0) & (table.state[table.slot_of] == State.READY)).all()

    @invariant()
    def visible_slots_hold_their_expert(self) -> None:
        for layer, (*_, records) in enumerate(LAYERS):
            pool, local = self.cache.layer(layer)._sound, self.cache.layer(layer)._local
            slots = pool.table.lookup(local, np.arange(len(records)))
            for expert in np.flatnonzero(slots >= 0):
                assert torch.equal(pool.memory[slots[expert]], records[expert])

    @invariant()
    def slots_in_use_stay(self) -> None:
        for layer, (experts, slots) in self.steps.items():
            pool, local = self.cache.layer(layer)._sound, self.cache.layer(layer)._local
            now = pool.table.key_of[slots[slots >= 0]]
            mine = pool.table.keys(local, experts[slots >= 0])
            assert ((now == mine) | (now == -1)).all(), "free where the copy has failed, but nobody else's"
            assert (pool.table.pins[slots[slots >= 0]] > 0).all()

    @invariant()
    def what_waits_is_bounded(self) -> None:
        """An expert queued twice, or a queue that grows."""
        for pool in self.cache._pools:
            queued = [(wish.layer, expert) for wish in pool._waiting._waiting for expert in wish.experts.tolist()]
            assert len(set(queued)) == len(queued)
            waiting, flying = len(queued), pool._uploads.experts
            assert waiting == 0 or waiting + flying <= max(pool._queued_limit, flying)

    @invariant()
    def prefetches_add_up(self) -> None:
        counters = self.cache.counters
        open_ends = sum(int(pool.table.marks.sum()) for pool in self.cache._pools)
        assert (
            counters.prefetch_issued.sum() == counters.prefetch_used.sum() + counters.prefetch_wasted.sum() + open_ends
        )

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for layer in self.steps:
            self.cache.layer(layer).finish()
        self.attempt(self.cache.drain)
        assert all((pool.table.pins == 0).all() for pool in self.cache._pools)
        self.cache.close()
        assert self.device.pinned == []


TestCacheMachine = Machine.TestCase
TestCacheMachine.settings = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=60)
