"""Policies that value experts: against plain Python, against the price, and against routing that misleads them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moebius.gpu_cache.policy import POLICIES, Default, Reason, make_policy
from moebius.gpu_cache.slots import SlotTable


def load(table: SlotTable, layer: int, experts: np.ndarray, slots: np.ndarray) -> int:
    table.reserve(layer, slots[slots >= 0], experts[slots >= 0])
    table.publish(slots[slots >= 0])
    return int((slots >= 0).sum())


Steps = np.ndarray | list[list[np.ndarray]]  # distinct experts that each layer used, in each step


def drive(policy, table: SlotTable, steps: Steps) -> tuple[int, int]:
    """Admit the misses of steps at once; hits and uploads."""
    hits = uploads = 0
    for step in steps:
        for layer, used in enumerate(step):
            experts = used.astype(np.int32)
            hit = table.lookup(layer, experts) >= 0
            policy.used(layer, experts, hit)
            missed = experts[~hit]
            uploads += load(table, layer, missed, policy.place(table, layer, missed, Reason.ADMIT))
            hits += int(hit.sum())
    return hits, uploads


def cost(name: str, steps: Steps, experts: int, slots: int, price: float) -> float:
    layers, uses = len(steps[0]), sum(len(used) for step in steps for used in step)
    table = SlotTable([experts] * layers, slots * layers)
    hits, uploads = drive(make_policy(name, [experts] * layers, price), table, steps)
    return (uses - hits + price * uploads) / uses


def draw(rng: np.random.Generator, tokens: int, layers: int, experts: int, k: int, weights=None) -> np.ndarray:
    """Routing by weighted sampling without replacement, int [T, L, k]."""
    scores = rng.gumbel(size=(tokens, layers, experts)) + (0 if weights is None else weights)
    return np.argsort(-scores, axis=-1)[..., :k]


class PlainEMA:
    """`ema` in plain Python: averages in a dictionary, one pool, one margin."""

    def __init__(self, slots: int, price: float, experts: int) -> None:
        self.slots, self.price, self.experts = slots, price, experts
        self.average: dict[tuple[int, int], float] = {}
        self.kept: list[tuple[int, int]] = []  # by slot; of equals the first leaves
        self.steps: dict[int, int] = {}
        self.share = 1 / 8

    def step(self, layer: int, experts: list[int]) -> tuple[int, int]:
        self.share += 0.01 * (len(experts) / self.experts - self.share)
        room = self.slots / (2 * self.experts) if self.kept else 1 / 4  # known from the first upload on
        horizon = max(2.0, math.sqrt(32 * room / self.share) * self.price**0.75)
        self.steps[layer] = self.steps.get(layer, 0) + 1
        rate = max(1 - 0.5 ** (1 / 16), 1 / (self.steps[layer] + 1))
        for expert in range(self.experts):
            old = self.average.get((layer, expert), 0.0)
            self.average[layer, expert] = old + rate * ((expert in experts) - old)
        missed = [(layer, e) for e in experts if (layer, e) not in self.kept]
        uploads = 0
        for key in sorted(missed, key=lambda key: -self.average[key]):
            if len(self.kept) == self.slots:
                weakest = min(range(self.slots), key=lambda slot: self.average[self.kept[slot]])
                if horizon * (self.average[key] - self.average[self.kept[weakest]]) <= self.price:
                    break
                self.kept[weakest] = key
            else:
                self.kept.append(key)
            uploads += 1
        return len(experts) - len(missed), uploads


@pytest.mark.parametrize("price", [0.25, 1.0, 3.0])
def test_ema_decides_as_plain_python_does(price):
    """A wrong average, margin, horizon or victim in compiled code."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 12)).repeat(1, axis=0) * 1.5
    routing = np.concatenate([draw(rng, 150, 2, 12, 3, weights), draw(rng, 150, 2, 12, 3, -weights)])
    plain = PlainEMA(8, price, 12)
    policy, table = make_policy("ema", [12, 12], price), SlotTable([12, 12], 8)
    total = 0
    for token in routing:
        for layer in range(2):
            expected = plain.step(layer, token[layer].tolist())
            experts = token[layer].astype(np.int32)
            hit = table.lookup(layer, experts) >= 0
            policy.used(layer, experts, hit)
            slots = policy.place(table, layer, experts[~hit], Reason.ADMIT)
            uploads = load(table, layer, experts[~hit], slots)
            total += uploads
            assert (int(hit.sum()), uploads) == expected
    assert 8 < total < routing.size / 2, "the case decides nothing"


@pytest.mark.parametrize("name", ["mrs", "ema", "ema_table", "default"])
def test_a_dearer_upload_is_made_less_often(name):
    """A policy that ignores the price it is told."""
    rng = np.random.default_rng(1)
    routing = np.concatenate([draw(rng, 200, 1, 16, 3, rng.normal(size=(1, 16)) * 2) for _ in range(4)])
    uploads = []
    for price in (0.1, 1.0, 10.0):
        table = SlotTable([16], 6)
        uploads.append(drive(make_policy(name, [16], price), table, routing)[1])
    assert uploads[0] > uploads[1] > uploads[2] >= 6


def test_the_price_can_change_at_any_time():
    """A live cache measures the price while it runs."""
    rng = np.random.default_rng(2)
    routing = np.concatenate([draw(rng, 300, 1, 16, 3, rng.normal(size=(1, 16)) * 2) for _ in range(2)])
    policy, table = make_policy("default", [16], 0.5), SlotTable([16], 6)
    drive(policy, table, routing[:300])
    policy.price = 1e6
    assert drive(policy, table, routing[300:])[1] == 0
    assert policy.price == 1e6


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match="finite number of misses"):
        make_policy("default", [4], price)


def test_static_keeps_what_it_learned_first():
    """A static cache that moves cannot serve as the baseline."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(1, 16)) * 2
    policy, table = make_policy("static", [16]), SlotTable([16], 4)
    drive(policy, table, draw(rng, 1024, 1, 16, 2, weights))
    kept = sorted(table.key_of.tolist())
    assert drive(policy, table, draw(rng, 300, 1, 16, 2, -weights))[1] == 0
    assert sorted(table.key_of.tolist()) == kept
    assert set(np.argsort(-weights[0])[:3].tolist()) <= set(kept)


def test_a_guest_of_static_leaves_again():
    """Demand that is refused, for which a tier that reads from a file waits for ever; a guest that stays for good."""
    rng = np.random.default_rng(3)
    weights = np.arange(16)[None] * 2.0
    policy, table = make_policy("static", [16]), SlotTable([16], 4)
    drive(policy, table, draw(rng, 1100, 1, 16, 2, weights))
    kept = sorted(table.key_of.tolist())
    assert kept == [12, 13, 14, 15]
    guest = np.array([0], np.int32)
    assert load(table, 0, guest, policy.place(table, 0, guest, Reason.DEMAND)) == 1
    assert sorted(table.key_of.tolist()) == [0, 13, 14, 15]
    assert drive(policy, table, draw(rng, 300, 1, 16, 2, weights))[1] == 1
    assert sorted(table.key_of.tolist()) == kept


@pytest.mark.parametrize("name", ["default", "ema", "lru"])
def test_prefetch_needs_a_chance_above_break_even(name):
    """At r = 1/2 a prefetch pays from probability 1/3; below, it costs more than it saves."""
    rng = np.random.default_rng(4)
    policy, table = make_policy(name, [16, 16], 0.5), SlotTable([16, 16], 8)
    drive(policy, table, draw(rng, 200, 2, 16, 3, rng.normal(size=(2, 16)) * 2))
    absent = np.flatnonzero(table.lookup(1, np.arange(16)) < 0)[:1].astype(np.int32)
    assert policy.place(table, 1, absent, Reason.PREFETCH, np.array([0.32])).tolist() == [-1]
    assert policy.place(table, 1, absent, Reason.PREFETCH, np.array([1.0]))[0] >= 0


class Unlinked(Default):
    rule = replace(Default.rule, linked=False)


def test_default_hears_the_layers_before(monkeypatch):
    """Links to the wrong layer or token, or never learned: each layer's next experts are told by the layer before."""
    monkeypatch.setitem(POLICIES, "unlinked", Unlinked)
    first = draw(np.random.default_rng(7), 1200, 1, 16, 2)
    routing = np.concatenate([first, np.roll(first, 1, axis=0) * 5 % 16], axis=1)
    assert cost("default", routing, 16, 8, 0.25) < 0.97 * cost("unlinked", routing, 16, 8, 0.25)


def cyclic(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Every expert in turn: recency always evicts what comes next."""
    return (np.arange(1500 * batch)[:, None, None] * 2 + np.arange(2)) % 16 + np.zeros((1, 2, 1), int)


def phases(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Another set of favourites every 40 steps."""
    return np.concatenate([draw(rng, 40 * batch, 2, 16, 2, rng.normal(size=(2, 16)) * 3) for _ in range(40)])


def short_phases(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Favourites change before an upload has paid."""
    return np.concatenate([draw(rng, 4 * batch, 2, 16, 2, rng.normal(size=(2, 16)) * 3) for _ in range(400)])


def uniform(rng: np.random.Generator, batch: int) -> np.ndarray:
    return draw(rng, 1500 * batch, 2, 16, 2)


def one_hot(rng: np.random.Generator, batch: int) -> np.ndarray:
    weights = np.zeros((2, 16))
    weights[:, 5] = 20
    return draw(rng, 1500 * batch, 2, 16, 2, weights)


def merged(routing: np.ndarray, batch: int) -> list[list[np.ndarray]]:
    """Steps of so many tokens each."""
    steps = routing.reshape(-1, batch, *routing.shape[1:])
    return [[np.unique(step[:, layer]) for layer in range(routing.shape[1])] for step in steps]


@pytest.mark.parametrize("price", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("make", [cyclic, phases, short_phases, uniform, one_hot], ids=lambda make: make.__name__)
def test_default_is_never_far_worse_than_static(make, batch, price):
    """Routing without anything to learn, at which uploads are wasted; batches that use more than there are slots."""
    steps = merged(make(np.random.default_rng(5), batch), batch)
    if batch > 1:
        assert np.mean([len(used) for step in steps for used in step]) > 4, "fewer than slots"
    assert cost("default", steps, 16, 4, price) <= 1.1 * cost("static", steps, 16, 4, price)


@pytest.mark.parametrize("price", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("slots", [4, 24])
def test_default_holds_with_batches_of_64_tokens(slots, price):
    """Steps that use more experts than there are slots, all at once, and displace one another for ever."""
    rng = np.random.default_rng(8)
    steps = merged(draw(rng, 300 * 64, 1, 48, 4, rng.normal(size=(1, 48)) * 2), 64)
    assert min(len(step[0]) for step in steps) > slots / 2
    assert cost("default", steps, 48, slots, price) <= 1.1 * cost("static", steps, 48, slots, price)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (512, 10), (64, 64)])
def test_any_size_works(name, experts, k):
    """One expert, many, all of them at once, and more wanted than there are slots."""
    routing = draw(np.random.default_rng(6), 30, 2, experts, k)
    table = SlotTable([experts, experts], max(2, experts // 8))
    hits, uploads = drive(make_policy(name, [experts, experts]), table, routing)
    assert uploads >= min(table.slots, experts)
    assert hits > 0
