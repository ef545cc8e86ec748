"""Predictors on the small trained model's own hidden states and routers, over held-out text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moebius
from moebius.hf_plugin.running.lookahead import Lookahead
from moebius.predictors.routing import PREDICTORS
from moebius.predictors.switch import Switch
from tests.hf_plugin import helpers

MODEL = Path(__file__).parents[1] / "data" / "tiny_moe"
TOKENS = 1000


class Heard:
    """A model's text: what each of its layers was given, and chose; and their gates."""

    def __init__(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        text = (MODEL / "held_out_excerpt.txt").read_text()
        ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt")["input_ids"][:, :TOKENS]
        self.x: list[torch.Tensor] = []  # of each layer [T, H]
        self.ids: list[np.ndarray] = []  # int32 [T, k]
        moebius.patch(model, device="cpu")
        layers = [vars(module)["_moebius"] for module in helpers.experts_modules(model)]
        for module in helpers.experts_modules(model):
            module.register_forward_pre_hook(self._hear)
        with torch.no_grad():
            model(ids)
        self.model, self.gates = model, [layer.gate for layer in layers]

    def _hear(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self.x.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        self.ids.append(arguments[1].numpy().astype(np.int32))


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


class Nowhere:
    """A cache, and what it is of each layer, in which nothing ever is."""

    price = 1.0

    def __init__(self, experts: int) -> None:
        self._slots = np.full(experts, -1, np.int32)

    def layer(self, number: int) -> Nowhere:
        return self

    def slots(self) -> np.ndarray:
        return self._slots

    def prefetch(self, experts: np.ndarray, chances: np.ndarray) -> int:
        return 0


def recall(heard: Heard, name: str) -> float:
    """Share of the second half's used experts that were thought at least as likely as not, one token at a time."""
    experts = heard.model.config.num_experts
    costs = SimpleNamespace(upload_us=0.0, cpu=SimpleNamespace(call=lambda tokens: 1e9))
    place: Any = SimpleNamespace(cache=Nowhere(experts), costs=costs)
    gates: list[Any] = [gate.__call__ for gate in heard.gates]
    assert all(gate() is not None for gate in gates)
    lookahead = Lookahead(PREDICTORS[name], [experts] * len(gates), gates)
    for token in range(TOKENS):
        if token == TOKENS // 2:
            lookahead.reset_stats()
        for layer in range(len(gates)):
            question = lookahead.ask(layer, heard.x[layer][token : token + 1], place)
            assert question is not None
            lookahead.foresee(question, layer, heard.ids[layer][token : token + 1], place)
    found = [lookahead.layer_stats(layer) for layer in range(1, len(gates))]
    return sum(row["predicted_right"] for row in found) / sum(row["predicted_of"] for row in found)


def test_blend_is_at_least_as_good_as_the_best_single_predictor(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blend that a worse part drags down, and offsets or ids that add nothing to what routers say."""
    monkeypatch.setattr(Switch, "_refusal", lambda *arguments: None)
    monkeypatch.setattr(Switch, "begin_token", lambda switch: True)
    found = {name: recall(heard, name) for name in PREDICTORS if name != "none"}
    assert found["blend"] >= max(found.values()), found
    assert found["blend"] > found["next_gate_residual"] + 0.005, found
    assert found["next_gate_residual"] > found["next_gate"] > found["ids"] > 0.4, found
