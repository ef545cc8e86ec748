"""The predictor at work: what it offers to the cache, when, and when it keeps still."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moebius
from moebius.hf_plugin.running.lookahead import Lookahead, hint_of
from moebius.predictors.routing import PREDICTORS, Routing
from moebius.predictors.switch import BURST, Switch
from tests import zoo
from tests.hf_plugin.helpers import EMULATED, logits, patched, prompt

E = 8


@dataclass
class Cache:
    """Takes note of prefetches; nothing is ever resident unless said so."""

    price: float = 1.0
    resident: list[int] = field(default_factory=list)
    offered: list[tuple[int, list[int], list[float]]] = field(default_factory=list)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self, number)


@dataclass
class LayerCache:
    cache: Cache
    number: int

    def slots(self) -> np.ndarray:
        slots = np.full(E, -1, np.int32)
        slots[self.cache.resident] = 0
        return slots

    def prefetch(self, experts: np.ndarray, chances: np.ndarray) -> int:
        self.cache.offered.append((self.number, experts.tolist(), chances.tolist()))
        return len(experts)


def tier(cache: Cache, upload_us: float = 0.0, miss_us: float = 1e9) -> Any:
    return SimpleNamespace(
        cache=cache, costs=SimpleNamespace(upload_us=upload_us, cpu=SimpleNamespace(call=lambda tokens: miss_us))
    )


def gate(x: torch.Tensor) -> Routing:
    scores = x @ torch.eye(E)
    return Routing(scores.topk(2).indices, scores)


def run(lookahead: Lookahead, place: Any, tokens: int, seed: int = 0, batch: int = 1) -> list[np.ndarray]:
    """Two layers that both route by the two largest of the same hidden states; the ids of each token."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(tokens):
        x = torch.randn(batch, E, generator=generator)
        ids = gate(x).ids.numpy()
        for layer in range(2):
            question = lookahead.ask(layer, x, place)
            lookahead.missed(2)
            if question is not None:
                lookahead.foresee(question, layer, ids, place)
        history.append(ids)
    return history


def make(name: str) -> Lookahead:
    return Lookahead(PREDICTORS[name], [E, E], [lambda: None, lambda: gate])


@pytest.mark.parametrize("name", ["next_gate", "next_gate_residual", "blend"])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_the_next_router_chooses_is_prefetched(name: str, batch: int) -> None:
    """Catches chances that do not belong to their experts, and offers for the wrong layer or past the last."""
    cache, lookahead = Cache(price=0.25), make(name)
    run(lookahead, tier(cache), 300, batch=batch)
    cache.offered.clear()
    history = run(lookahead, tier(cache), 100, seed=1, batch=batch)
    assert {layer for layer, _, _ in cache.offered} == {1}
    assert len(cache.offered) >= 95
    if len(cache.offered) == len(history):
        right = [np.isin(experts, ids).mean() for (_, experts, _), ids in zip(cache.offered, history, strict=True)]
        assert np.mean(right) > 0.9
    assert all(chances == sorted(chances, reverse=True) and min(chances) >= 0.2 for _, _, chances in cache.offered)


def test_what_is_resident_is_not_offered() -> None:
    """Catches offers that would cost a look at the policy for nothing."""
    cache, lookahead = Cache(resident=[0, 1, 2]), make("next_gate")
    run(lookahead, tier(cache), 300)
    assert cache.offered
    assert not {0, 1, 2} & {expert for _, experts, _ in cache.offered for expert in experts}


def test_a_dear_upload_needs_a_high_chance() -> None:
    """Catches a threshold that does not follow the price."""
    cheap, dear = Cache(price=0.1), Cache(price=9.0)
    for cache in (cheap, dear):
        run(make("ids"), tier(cache), 400)
    assert sum(len(experts) for _, experts, _ in cheap.offered) > 5 * sum(len(e) for _, e, _ in dear.offered)
    assert all(min(chances) >= 0.9 for _, _, chances in dear.offered)


def test_no_more_than_arrives_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a queue of copies of which only the first arrives before its layer begins, and copies all in vain."""
    cache, lookahead = Cache(price=0.1), make("next_gate")
    run(lookahead, tier(cache, upload_us=1e12), 300)
    assert not cache.offered
    assert any("in time" in note for note in lookahead.notes())
    monkeypatch.setattr(Switch, "_refusal", lambda *args: None)
    run(lookahead, tier(cache, upload_us=1e12), 300)
    assert max(len(experts) for _, experts, _ in cache.offered) == 1


def test_a_layer_that_is_wrong_is_switched_off_and_on_again() -> None:
    """Catches a switch that goes by the model's precision instead of the layer's, or never comes back."""
    cache, lookahead = Cache(price=3.0), make("next_gate")
    run(lookahead, tier(cache), 320)
    assert lookahead.layer_stats(1)["prefetching"] == 1
    assert lookahead.forecaster is not None
    record = lookahead.forecaster.state[-2]
    record[1, -2:] = 1.0, 0.0  # of late, none of the offers was right
    run(lookahead, tier(cache), 32, seed=2)
    assert lookahead.layer_stats(1)["prefetching"] == 0
    seen = len(cache.offered)
    run(lookahead, tier(cache), 320, seed=3)
    assert lookahead.layer_stats(1)["prefetching"] == 1
    assert len(cache.offered) > seen


@pytest.mark.parametrize(("read_us", "gap_us", "awake"), [(400, 500, True), (1, 500, False), (400, 1, False)])
def test_reading_ahead_pays_by_what_a_read_hides(read_us: float, gap_us: float, awake: bool) -> None:
    """Catches a tier of a file that reads ahead whatever that costs, or that counts none of its misses."""
    offered: list[int] = []
    host: Any = SimpleNamespace(
        cache=Cache(), read_us=read_us, take_misses=lambda: 100, read_ahead=lambda layer, experts: offered.append(layer)
    )
    lookahead = Lookahead(PREDICTORS["next_gate"], [E, E], [lambda: None, lambda: gate], host)
    run(lookahead, None, 31)
    assert not offered or awake
    lookahead._spent[:], lookahead._gaps[:] = [20.0], [gap_us]
    offered.clear()
    run(lookahead, None, 8, seed=1)
    assert bool(offered) is awake
    assert set(offered) <= {1}


@pytest.mark.parametrize(
    ("miss_us", "upload_us", "read_us", "reads", "awake"),
    [
        (1e-6, 0.0, 1.0, 2, False),  # neither pays,
        (400.0, 0.0, 1.0, 2, True),  # computing on the device does,
        (1e-6, 0.0, 400.0, 32, True),  # reading ahead does,
        (400.0, 1e12, 400.0, 32, True),  # though no copy comes in time,
        (400.0, 1e12, 400.0, 0, False),  # but not where all is in memory
    ],
)
def test_a_cache_before_a_file_rests_where_neither_pays(
    miss_us: float, upload_us: float, read_us: float, reads: int, awake: bool
) -> None:
    """Catches a predictor that works for ever, or reads ahead while it rests, where a cache stands before a file."""
    cache, ahead = Cache(price=0.25), list[int]()
    host: Any = SimpleNamespace(
        cache=Cache(), read_us=read_us, take_misses=lambda: reads, read_ahead=lambda layer, experts: ahead.append(layer)
    )
    lookahead = Lookahead(PREDICTORS["next_gate"], [E, E], [lambda: None, lambda: gate], host)
    place = tier(cache, upload_us, miss_us)
    run(lookahead, place, 31)
    for tokens in (32, 32, 32, BURST):  # a judgement at the beginning of each, by these times; the last are foreseen
        lookahead._spent[:], lookahead._gaps[:] = [20.0], [500.0]
        ahead.clear()
        cache.offered.clear()
        run(lookahead, place, tokens, tokens)
    assert (bool(ahead), bool(cache.offered)) == (awake, awake)
    assert lookahead.layer_stats(1)["prefetching"] == awake


def test_at_rest_it_measures_in_bursts() -> None:
    """Catches a predictor that works on although nothing can be won, and one that never looks again."""
    cache, lookahead = Cache(), make("blend")
    run(lookahead, tier(cache, miss_us=1e-6), 40)
    before = lookahead.switch.learned
    run(lookahead, tier(cache, miss_us=1e-6), 512)
    assert lookahead.switch.learned - before == 4 * BURST
    assert lookahead.layer_stats(1)["prefetching"] == 0
    assert "prefetching rests" in lookahead.notes()[0]


@pytest.mark.parametrize("name", ["ids", "blend"])
def test_without_a_gate_ids_still_foresee(name: str) -> None:
    """Catches predictors that give up where the router cannot be asked."""
    cache = Cache(price=0.25)
    lookahead = Lookahead(PREDICTORS[name], [E, E], [lambda: None] * 2)
    run(lookahead, tier(cache), 2000)
    cache.offered.clear()
    run(lookahead, tier(cache), 100, seed=1)
    assert len(cache.offered) > 90


def test_answers_come_to_the_host_as_they_are() -> None:
    """Catches ids that lose their type, and scores in a type that numpy does not know."""
    scores = torch.randn(3, E, dtype=torch.bfloat16)
    hint = hint_of((scores.topk(2).indices, scores))
    assert hint is not None
    assert hint.ids.tolist() == scores.topk(2).indices.tolist()
    assert hint.scores.tolist() == scores.float().tolist()
    assert (hint.ids.dtype, hint.scores.dtype) == (np.int32, np.float32)
    without = hint_of((scores.topk(2).indices,))
    assert without is not None
    assert len(without.scores) == 0
    assert hint_of(()) is None


def test_a_model_whose_gates_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches forecasts that need a gate, and statistics that hide that there is none."""
    monkeypatch.setattr(Switch, "_refusal", lambda *args: None)
    model = zoo.build("deepseek_v4")
    with patched(model, **EMULATED):
        for _ in range(6):
            logits(model, prompt(model, 1))
        stats = moebius.stats(model)
    assert any("no gate prediction" in note for note in stats.notes)
    assert stats.sums.forecasts > 0
