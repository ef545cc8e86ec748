"""Gates: a layer's router asked about the future, without being noticed, and only where it is the layer's routing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moebius
from moebius.hf_plugin.discovery.gates import LayerGate
from moebius.predictors.switch import Switch
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EMULATED, assert_close, logits, patched, prompt

E, K, H = 8, 2, 16


# ---- which functions are taken for a layer's routing


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H, generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def scores(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.reshape(-1, H) @ self.weight.T


class GivesIds(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.scores(x)
        values, ids = scores.softmax(-1).topk(K)
        return scores, values, ids


class GivesScores(Router):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class WantsThreeDimensions(Router):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return self.scores(x).view(batch, length, E)


class TakesAnOption(Router):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.scores(x) * scale


class NeedsTokenIds(Router):
    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return self.scores(x).roll(int(input_ids.sum()), -1)


class KeepsState(Router):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).roll(self.calls, -1)


class Fails(Router):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("only after the embedding")


class Draws(Router):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) + (torch.rand(len(x), E) if self.training else 0)


def block(router: nn.Module) -> tuple[nn.Module, LayerGate]:
    parent = nn.Module()
    parent.norm, parent.router = nn.LayerNorm(H), router
    parent.eval()
    return parent, LayerGate(parent, E)


X = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(3, H, generator=torch.Generator().manual_seed(2))


def routed(router: Router, x: Tensor) -> Tensor:
    return (x @ router.weight.T).topk(K).indices


@pytest.mark.parametrize("kind", [GivesIds, GivesScores, WantsThreeDimensions, TakesAnOption, Draws])
def test_a_function_of_the_hidden_states_is_a_gate(kind: type[Router]) -> None:
    """Catches forms of routers that are not recognised, and a gate that answers for the tokens of its settling."""
    router = kind()
    parent, gate = block(router)
    assert gate() is None
    gate.settle(X, routed(router, X))
    found = gate()
    assert found is not None, gate.reason
    assert gate.reason is None
    assert found(MORE).ids.sort(-1).values.tolist() == routed(router, MORE).sort(-1).values.tolist()
    assert parent.router is router


def test_a_selection_that_the_block_makes() -> None:
    """Catches blocks whose router gives scores, and whose own method selects from them, as with a bias."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.bias = GivesScores(), torch.arange(E) * 10.0

        def route_tokens_to_experts(self, scores: Tensor) -> tuple[Tensor, Tensor]:
            ids = (scores + self.bias).topk(K).indices
            return ids, scores.gather(1, ids)

    parent = Block().eval()
    gate = LayerGate(parent, E)
    gate.settle(X, torch.tensor([[E - 1, E - 2]] * len(X)))
    found = gate()
    assert found is not None
    assert found(MORE).ids.sort(-1).values.tolist() == [[E - 2, E - 1]] * 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NeedsTokenIds, "no gate prediction"),
        (KeepsState, "gives other experts than the model"),
        (Fails, "ValueError: only after the embedding"),
    ],
)
def test_other_routers_are_left_alone_with_a_reason(kind: type[Router], reason: str) -> None:
    """Catches a gate that foresees something else than the layer will route."""
    router = kind()
    _, gate = block(router)
    gate.settle(X, routed(router, X))
    assert gate() is None
    assert gate.reason is not None
    assert reason in gate.reason


def test_wrong_ids_refuse_a_gate() -> None:
    """Catches a check that compares shapes only: the router must give the ids that the model gave."""
    router = GivesIds()
    _, gate = block(router)
    gate.settle(X, (routed(router, X) + 1) % E)
    assert gate() is None
    assert gate.reason == "no gate prediction: the router gives other experts than the model for the experts' own input"


def test_no_router_is_a_reason_too() -> None:
    """Catches a norm or a projection of another width that is taken for a router."""
    parent = nn.Module()
    parent.norm, parent.shared = nn.LayerNorm(H), nn.Linear(H, E // 2)
    parent.eval()
    gate = LayerGate(parent, E)
    gate.settle(X, torch.zeros(len(X), K, dtype=torch.long))
    assert gate() is None
    assert gate.reason == "no gate prediction: no router"


def test_settled_once_and_not_on_nothing() -> None:
    """Catches a gate that settles on an empty batch, or again on every call."""
    router = GivesIds()
    _, gate = block(router)
    gate.settle(X[:0], routed(router, X[:0]))
    assert router.calls == 0
    gate.settle(X, routed(router, X))
    calls = router.calls
    gate.settle(X, (routed(router, X) + 1) % E)
    assert (gate() is not None, router.calls) == (True, calls)


def test_no_gate_in_training() -> None:
    """Catches predictions that draw the random numbers of a router in training."""
    router = Draws()
    parent, gate = block(router)
    parent.train()
    gate.settle(X, routed(router, X))
    assert router.calls == 0
    parent.eval()
    gate.settle(X, routed(router, X))
    assert gate() is not None
    parent.train()
    assert gate() is None


def test_no_hook_fires() -> None:
    """Catches a router that is called as a module: recorders of router logits would see the prediction."""
    router = GivesIds()
    seen: list[Any] = []
    router.register_forward_hook(lambda *args: seen.append(args))
    router.register_forward_pre_hook(lambda *args: seen.append(args))
    _, gate = block(router)
    gate.settle(X, routed(router, X))
    found = gate()
    assert found is not None
    found(MORE)
    assert seen == []


def test_a_copied_gate_asks_the_copied_router() -> None:
    """Catches a copy of a model whose predictions come from the original's routers."""
    parent, gate = block(GivesIds())
    gate.settle(X, routed(parent.router, X))
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(parent, memo)
    with torch.no_grad():
        twin.router.weight.neg_()
    copied = gate.copied(memo)
    copied.settle(X, routed(twin.router, X))
    found = copied()
    assert found is not None
    assert found(MORE).ids.sort(-1).values.tolist() == routed(twin.router, MORE).sort(-1).values.tolist()


# ---- whole models

# softmax, renormalised, groups with a selection bias, bias of the router, sparsemixer
PREDICTED = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe")
# experts that see scores instead of ids, and routing by token ids
NOT_PREDICTED = ("llama4", "deepseek_v4")


def router_calls(model: PreTrainedModel, ids: Tensor) -> list[tuple[str, Tensor]]:
    """Names and first outputs of all calls of modules called router or gate in three forwards."""
    calls: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            calls.append((name, (output[0] if isinstance(output, tuple) else output).clone()))

        return record

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name.endswith((".router", ".gate"))
    ]
    for _ in range(3):
        logits(model, ids)
    for handle in hooks:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", PREDICTED + NOT_PREDICTED)
def test_predictions_leave_no_trace_in_the_model(name: str) -> None:
    """Catches routers called more often, with other inputs, or changed by being asked."""
    model = zoo.build(name)
    ids = prompt(model, 1)
    state = helpers.weights(model)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    want = router_calls(model, ids)
    assert want
    with patched(model, **EMULATED):
        got = router_calls(model, ids)
        stats = moebius.stats(model)
        assert all(helpers.same_bits(value, buffers[key]) for key, value in model.named_buffers())
    assert [name for name, _ in got] == [name for name, _ in want]
    for (_, ours), (_, stock) in zip(got, want, strict=True):
        assert_close(ours, stock)
    helpers.assert_same_weights(model, state)
    if name in PREDICTED:
        assert stats.notes == []
        assert len(stats.layers) == 1 or stats.sums.predicted > 0
    else:
        assert stats.notes
        assert all("no gate prediction: the router gives other experts" in note for note in stats.notes)
        assert "note: " in str(stats)


def test_randomness_is_untouched() -> None:
    """Catches a prediction that draws from the generator that sampling uses."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model, 1)
    with patched(model, **EMULATED):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        for _ in range(3):
            logits(model, ids)
        assert torch.equal(torch.get_rng_state(), before)


def _predictable() -> PreTrainedModel:
    """Nothing is added to the hidden state, and both layers route alike: the second's experts are known exactly."""
    model = zoo.build("qwen3_moe")
    first, second = model.model.layers
    with torch.no_grad():
        for layer in (first, second):
            layer.self_attn.o_proj.weight.zero_()
        first.mlp.experts.down_proj.zero_()
        second.post_attention_layernorm.weight.copy_(first.post_attention_layernorm.weight)
        second.mlp.gate.weight.copy_(first.mlp.gate.weight)
    return model


@pytest.fixture
def _sleepless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny experts are cheap, so that foreseeing them would rest."""
    monkeypatch.setattr(Switch, "_refusal", lambda *args: None)


@pytest.mark.usefixtures("_sleepless")
@pytest.mark.parametrize("predictor", ["next_gate", "next_gate_residual", "blend"])
def test_recall_and_precision_are_high_where_the_future_is_certain(predictor: str) -> None:
    """Catches predictions from the wrong layer's router or hidden state, and wrong bookkeeping of what was used."""
    model = _predictable()
    with patched(model, **EMULATED, predictor=predictor):
        for seed in range(200):
            if seed == 100:
                moebius.reset_stats(model)
            logits(model, zoo.inputs(model, 1, 2, seed=seed)["input_ids"])
        layer = moebius.stats(model).layers[1]
    assert layer.predicted_of == 100 * 2 * model.config.num_experts_per_tok
    assert layer.recall > 0.95
    assert layer.predicted_right > 0.95 * layer.predicted
    assert layer.predicted_absent_right > 0.5 * layer.predicted_absent > 0
    assert layer.calibration_error < 0.05
    assert layer.prefetching == 1


@pytest.mark.usefixtures("_sleepless")
@pytest.mark.parametrize("predictor", ["next_gate", "ids"])
def test_recall_is_below_one_where_it_is_not(predictor: str) -> None:
    """Catches a predictor that looks at what the layer really used."""
    model = zoo.build("qwen3_moe")
    with patched(model, **EMULATED, predictor=predictor):
        for seed in range(60):
            logits(model, zoo.inputs(model, 1, 2, seed=seed)["input_ids"])
        stats = moebius.stats(model)
    assert stats.layers[1].forecasts > 0
    assert 0 < stats.layers[1].recall < 0.9
    assert stats.predictor == predictor


@pytest.mark.parametrize("off", [{"prefetch": False}, {"predictor": "none"}, {"device": "cpu"}])
def test_prediction_is_off_by_option(off: dict[str, Any]) -> None:
    """Catches prefetches that nobody asked for."""
    model = zoo.build("qwen3_moe")
    with patched(model, **(EMULATED | off)):
        for _ in range(4):
            logits(model, prompt(model, 1))
        stats = moebius.stats(model)
    assert (stats.sums.predicted, stats.sums.prefetch_issued) == (0, 0)
    assert stats.predictor == "none"
    assert stats.notes == []


def test_long_prompts_are_not_predicted() -> None:
    """Catches a router that runs twice over a whole prompt, which uses most experts anyway."""
    model = zoo.build("qwen3_moe")
    with patched(model, **EMULATED):
        for _ in range(3):
            logits(model, prompt(model, 2, 40))
        assert moebius.stats(model).sums.predicted == 0
