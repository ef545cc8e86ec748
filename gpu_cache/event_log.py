"""What a live pool was told and what happened to its slots, in order: enough to repeat every decision elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moebius.gpu_cache.policy import CachePolicy, Reason
from moebius.gpu_cache.pool import Pool
from moebius.gpu_cache.slots import SlotTable


class Event(NamedTuple):
    """A call: of the policy ("used", "place") or of the slot table (the name of one of `TRANSITIONS`)."""

    name: str
    arguments: tuple[Any, ...]
    price: float
    slots: np.ndarray | None = None  # what "place" answered, int32 [n]


TRANSITIONS = ("reserve", "publish", "release", "pin", "unpin")
NAMES = ("used", "place", *TRANSITIONS)


class _Row(NamedTuple):
    """An event in numbers: layer and reason; experts or slots, what stands beside each, and answers or slots."""

    scalars: list[int]
    numbers: np.ndarray
    beside: np.ndarray  # whether it was a hit, or the chance of its use; NaN for nothing
    answers: np.ndarray


class EventLog:
    """Events of one pool, from its beginning.

    Args:
        experts: number of experts of each layer of the pool.
        slots: number of slots of the pool.
    """

    def __init__(self, experts: list[int], slots: int) -> None:
        self.experts, self.slots = experts, slots
        self.events: list[Event] = []

    @classmethod
    def record(cls, pool: Pool) -> EventLog:
        """Record an empty pool from here on.

        Raises:
            ValueError: the pool holds something already.
        """
        if (pool.table.key_of >= 0).any():
            raise ValueError("the pool holds experts already; record it from its beginning")
        log = cls(np.diff(pool.table.base).tolist(), pool.table.slots)
        pool.policy = _RecordedPolicy(pool.policy, log)
        for name in TRANSITIONS:
            setattr(pool.table, name, log._watch(name, getattr(pool.table, name), pool.policy))
        setattr(pool.table, "claim", log._watch_claim(pool.table.claim, pool.policy))  # noqa: B010 (no method to mypy)
        return log

    def arrays(self) -> dict[str, np.ndarray]:
        """The log as arrays that `numpy.savez` takes, of N events and M numbers in them all."""
        names = [NAMES.index(event.name) for event in self.events]
        rows = [_row(event) for event in self.events]
        nothing = np.empty(0)
        return {
            "shape": np.array([self.slots, *self.experts], np.int64),
            "name": np.array(names, np.uint8),
            "price": np.array([event.price for event in self.events]),
            "scalars": np.array([row.scalars for row in rows], np.int64).reshape(-1, 2),
            "offsets": np.cumsum([0, *(len(row.numbers) for row in rows)]).astype(np.int64),
            "numbers": np.concatenate([*(row.numbers for row in rows), nothing]).astype(np.int32),
            "beside": np.concatenate([*(row.beside for row in rows), nothing]),
            "answers": np.concatenate([*(row.answers for row in rows), nothing]).astype(np.int32),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> EventLog:
        """The log that gave these `arrays`."""
        slots, *experts = arrays["shape"].tolist()
        log, offsets = cls(experts, slots), arrays["offsets"].tolist()
        for number, kind in enumerate(arrays["name"].tolist()):
            part = slice(offsets[number], offsets[number + 1])
            vectors = (arrays[name][part] for name in ("numbers", "beside", "answers"))
            row = _Row(arrays["scalars"][number].tolist(), *vectors)
            log.events.append(_event(NAMES[kind], row, float(arrays["price"][number])))
        return log

    def repeat(self, policy: CachePolicy) -> list[np.ndarray]:
        """Tell a fresh policy all that was told and drive a fresh table as the live one was; its answers to "place"."""
        table, answers = SlotTable(self.experts, self.slots), []
        for event in self.events:
            policy.price = event.price
            if event.name == "place":
                answers.append(policy.place(table, *event.arguments))
            else:
                getattr(policy if event.name == "used" else table, event.name)(*event.arguments)
        return answers

    @property
    def placements(self) -> list[np.ndarray]:
        """The live answers to "place"."""
        return [event.slots for event in self.events if event.slots is not None]

    def _watch(self, name: str, call: Callable[..., Any], policy: CachePolicy) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.events.append(Event(name, _copied(arguments), policy.price))
            return call(*arguments)

        return watched

    def _watch_claim(self, claim: Callable[..., Any], policy: CachePolicy) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            slots, marked = claim(*arguments)
            self.events.append(Event("pin", (slots.copy(),), policy.price))
            return slots, marked

        return watched


class _RecordedPolicy:
    def __init__(self, policy: CachePolicy, log: EventLog) -> None:
        self._policy, self._log = policy, log

    @property
    def price(self) -> float:
        return self._policy.price

    @price.setter
    def price(self, value: float) -> None:
        self._policy.price = value

    def used(self, layer: int, experts: np.ndarray, hit: np.ndarray) -> None:
        self._log.events.append(Event("used", _copied((layer, experts, hit)), self.price))
        self._policy.used(layer, experts, hit)

    def place(
        self, table: SlotTable, layer: int, experts: np.ndarray, reason: Reason, chances: np.ndarray | None = None
    ) -> np.ndarray:
        slots = self._policy.place(table, layer, experts, reason, chances)
        self._log.events.append(Event("place", _copied((layer, experts, reason, chances)), self.price, slots.copy()))
        return slots


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.copy() if isinstance(value, np.ndarray) else value for value in arguments)


def _row(event: Event) -> _Row:
    if event.name == "used":
        layer, experts, hit = event.arguments
        return _Row([layer, 0], experts, hit, np.full(len(experts), -1))
    if event.name == "place":
        layer, experts, reason, chances = event.arguments
        assert event.slots is not None
        beside = np.full(len(experts), np.nan) if chances is None else chances
        return _Row([layer, reason], experts, beside, event.slots)
    if event.name == "reserve":
        layer, slots, experts = event.arguments
        return _Row([layer, 0], experts, np.full(len(experts), np.nan), slots)
    (slots,) = event.arguments
    return _Row([0, 0], slots, np.full(len(slots), np.nan), np.full(len(slots), -1))


def _event(name: str, row: _Row, price: float) -> Event:
    layer, reason = row.scalars
    if name == "used":
        return Event(name, (layer, row.numbers, row.beside.astype(bool)), price)
    if name == "place":
        chances = None if np.isnan(row.beside).any() else row.beside
        return Event(name, (layer, row.numbers, Reason(reason), chances), price, row.answers)
    return Event(name, (layer, row.answers, row.numbers) if name == "reserve" else (row.numbers,), price)
