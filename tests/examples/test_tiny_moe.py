"""The committed tiny MoE is a real language model: small, better than a bigram, and with living routers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from examples.tiny_moe_text import Evaluation, bigram_bits, encode, evaluate, is_held_out, routing_use

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests/data/tiny_moe"
EXCERPT = (CHECKPOINT / "held_out_excerpt.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ROOT / "benchmarks/results/train_tiny_moe.json").read_text())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training script, imported as it is when it runs: with its own folder on the path."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("train_tiny_moe")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def evaluation(model: PreTrainedModel) -> Evaluation:
    return evaluate(model, encode(AutoTokenizer.from_pretrained(CHECKPOINT), [EXCERPT]))


def test_checkpoint_stays_small_and_holds_no_pickle() -> None:
    """Catches a checkpoint saved in float32 or with optimizer state, which would weigh on every clone."""
    files = list(CHECKPOINT.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_architecture_is_the_one_the_project_promises(model: PreTrainedModel) -> None:
    """Catches a retrained checkpoint too small to exercise caching: 6 layers, 32 experts, top-4 at least."""
    config = model.config
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (6, 32, 4)
    assert len(AutoTokenizer.from_pretrained(CHECKPOINT)) == config.vocab_size


def test_tokenizer_is_lossless() -> None:
    """Catches a normaliser or clean-up step that changes text, which would falsify bits per byte."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = EXCERPT + "  \t tabs\r\n  \u00e9\u4e2d\U0001f600 \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_predicts_held_out_text_better_than_bigrams(evaluation: Evaluation, record: dict) -> None:
    """Catches untrained, broken or wrongly tied weights: a tenth better than the token bigram, even on a short text."""
    assert is_held_out("pathlib.py")
    bits_per_byte = evaluation.bits / len(EXCERPT.encode())
    assert bits_per_byte < 0.9 * record["bits_per_byte"]["token_bigram"] < record["bits_per_byte"]["byte_bigram"]


def test_every_layer_uses_at_least_half_of_its_experts(evaluation: Evaluation, record: dict) -> None:
    """Catches collapsed routers, with which cache and predictor results would mean nothing."""
    for row in routing_use(evaluation.load):
        assert row.experts_used >= 16, row
    assert all(row["experts_used"] >= 16 for row in record["routing"])


def test_evaluate_counts_every_token_once(model: PreTrainedModel) -> None:
    """Catches lost or doubled tokens at window borders, and padding counted as text."""
    sequences = [np.arange(n, dtype=np.int64) % 2048 for n in (2, 513, 514, 700)]
    load = evaluate(model, sequences).load
    assert (load.sum(1) == 4 * sum(len(ids) - 1 for ids in sequences)).all()


def test_bigram_baseline_is_a_probability_distribution() -> None:
    """Catches a baseline made weak by lost probability mass, which would flatter the model."""
    train = [np.array([0, 1, 2, 1, 2, 2], dtype=np.int64)]
    for before in range(4):
        bits = [bigram_bits(train, [np.array([before, after])], 4, strengths=(3,)) for after in range(4)]
        assert sum(2**-b for b in bits) == pytest.approx(1)


def test_training_experts_equal_stock_experts(script: ModuleType, model: PreTrainedModel) -> None:
    """Catches rows exchanged between experts, or a wrong gradient, in the script's own experts forward."""
    experts = model.model.layers[2].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 128, generator=generator, requires_grad=True)
    weights = torch.rand(50, 4, generator=generator, requires_grad=True)
    ids = torch.rand(50, 20, generator=generator).topk(4).indices  # experts 20 to 31 get no token
    target = torch.randn(50, 128, generator=generator)
    inputs = (hidden, weights, experts.gate_up_proj, experts.down_proj)
    results = []
    for forward in (script.padded_bf16_experts, grouped_mm_experts_forward):
        output = forward(experts, hidden, ids, weights).float()
        results.append((output.detach(), *torch.autograd.grad((output * target).sum(), inputs)))
    for ours, stock in zip(*results, strict=True):
        assert (ours - stock).norm() <= 0.02 * stock.norm()


def test_training_step_learns(script: ModuleType) -> None:
    """Catches an optimizer that skips parameters or steps the wrong way."""
    script.ALL_EXPERTS_FUNCTIONS.register("padded_bf16", script.padded_bf16_experts)
    model = script.build_model(AutoTokenizer.from_pretrained(CHECKPOINT), seed=0)
    model.set_experts_implementation("padded_bf16")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = script.build_optimizers(model)
    windows = torch.arange(65).repeat(2, 1)
    losses = []
    for _ in range(6):
        loss, balance = script.training_loss(model, windows)
        (loss + 0.01 * balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
