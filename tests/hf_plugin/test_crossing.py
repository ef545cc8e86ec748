"""What goes between host and device in a layer step: once there, once back, and nobody waits without need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.hf_plugin.discovery.gates import LayerGate
from moebius.hf_plugin.running import crossing, dispatcher
from moebius.hf_plugin.running.lookahead import Lookahead
from moebius.predictors.routing import PREDICTORS
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EMULATED, assert_close, logits, patched, prompt

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def devices() -> Iterator[None]:
    """Tensors without values, on devices that this machine may lack; operations across devices raise."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Crossings(TorchDispatchMode):
    """Counts copies that change the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.count[args[0].device.type, result.device.type] += 1
        return result


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_one_copy_brings_everything(devices: None, tokens: int) -> None:
    """Catches a copy for each tensor, each of which the host would wait for, and types that change on the way."""
    x, scores = (torch.empty(tokens, n, dtype=torch.bfloat16, device=HERE) for n in (7, 5))
    ids = torch.empty(tokens, 2, dtype=torch.int64, device=HERE)
    with Crossings() as crossings:
        found = crossing.to_host(x, ids, scores)
    assert [(t.shape, t.dtype, t.device.type) for t in found] == [(t.shape, t.dtype, "cpu") for t in (x, ids, scores)]
    assert crossings.count == {("cuda", "cpu"): 1}


def test_a_device_that_shares_memory_needs_none() -> None:
    x = torch.randn(2, 3)
    assert crossing.to_host(x)[0] is x
    rows = crossing.zeros(x, x.device)
    assert not rows.is_pinned()
    assert crossing.send(rows, x.device) is rows


@pytest.mark.parametrize(("tokens", "pinned"), [(1, True), (64, True), (4096, False)])
def test_rows_of_a_decode_step_go_back_without_a_wait(
    devices: None, monkeypatch: pytest.MonkeyPatch, tokens: int, pinned: bool
) -> None:
    """Catches a sum in pageable memory, whose copy waits for the device, and a prompt's that stays pinned for ever."""
    asked: list[bool] = []
    make = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory, **kw: asked.append(pin_memory) or make(*args, **kw))
    rows = crossing.zeros(torch.empty(tokens, 4096), HERE)
    assert asked == [pinned]
    waits: list[bool] = []
    move = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, target, non_blocking: waits.append(not non_blocking) or move(self, target)
    )
    assert crossing.send(rows, HERE).device == HERE
    assert waits == [not pinned]


def test_a_router_on_another_device(devices: None) -> None:
    """Catches hidden states and a router's weights on two devices, where a model is spread over several."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 16, device=THERE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    parent = nn.Module()
    parent.router = Router()
    gate = next(LayerGate(parent, 8)._candidates(parent, 2))
    lookahead = Lookahead(PREDICTORS["blend"], [8, 8], [lambda: None, lambda: gate])
    x = torch.empty(2, 16, device=HERE)
    assert gate(x).ids.device == THERE
    question = lookahead.ask(0, x, None)
    assert question is not None
    assert len(question.asked) == 2
    assert {tensor.device for tensor in question.asked} == {HERE}, "they come to the host with x, in one copy"


def test_the_router_s_answer_crosses_with_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer that is fetched later: on a GPU the host would wait for the device's experts, and only then
    begin with its own, so that the processors would take turns."""
    crossed: set[int] = set()
    answers = 0
    bring, foresee = crossing.to_host, Lookahead.foresee

    def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
        found = [tensor.clone() for tensor in bring(*tensors)]
        crossed.update(tensor.data_ptr() for tensor in found)
        return found

    def watched(self: Lookahead, question: Any, *args: Any) -> None:
        nonlocal answers
        answers += len(question.asked)
        assert {tensor.data_ptr() for tensor in question.asked} <= crossed
        foresee(self, question, *args)

    monkeypatch.setattr(dispatcher, "to_host", to_host)
    monkeypatch.setattr(Lookahead, "foresee", watched)
    model = helpers.trained()
    ids = prompt(model, 1, 8)
    want = logits(model, ids)
    with patched(model, **EMULATED):
        for _ in range(3):
            assert_close(logits(model, ids), want)
    assert answers > 0
