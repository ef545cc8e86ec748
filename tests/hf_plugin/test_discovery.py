"""Finding and verifying experts: architectures nobody listed are taken over, and surprises are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moebius
from moebius.hf_plugin.discovery.adapters import Convention
from moebius.hf_plugin.discovery.sites import find_sites
from moebius.kernels.experts import Act
from tests import zoo

E, H, WIDTH, K, T = 6, 20, 12, 2, 5


class Experts(nn.Module):
    """Standard packed experts of no known architecture, without any flag or named activation."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * WIDTH, H, generator=generator) / H**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for e, score in zip(chosen[t], scores[t], strict=True):
                gate, up = (self.gate_up_proj[e] @ hidden[t]).chunk(2)
                out[t] += score * self.finish(self.down_proj[e] @ (F.silu(gate) * up))
        return out

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        return y


class ScaledExperts(Experts):
    """Computes something that its layout does not show."""

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        return 1.5 * y


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.router = nn.Linear(H, E, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(K)
        return x + self.experts(x, chosen, scores)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_unseen_architecture_is_taken_over(x: torch.Tensor) -> None:
    """A list of model types or class names would miss it."""
    model = nn.Sequential(Block(Experts()), Block(Experts())).eval()
    stock = model(x)
    moebius.patch(model, device="emulated", gpu_memory=0.5)
    for _ in range(2):
        assert (model(x) - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert moebius.stats(model).to_dict()["hits"] > 0
    assert torch.equal(moebius.unpatch(model)(x), stock)


def test_experts_that_compute_something_else_are_refused(x: torch.Tensor) -> None:
    """Taken at its layout's word, this module would silently lose a factor of 1.5."""
    model = Block(ScaledExperts()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="computes something else"):
        moebius.patch(model, device="cpu")
    assert not moebius.is_patched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt_oss", {"transposed": True, "concatenated": False, "biased": True, "gated": True}),
        ("aria_text", {"transposed": True, "concatenated": True, "biased": False}),
        ("nemotron_h", {"gated": False, "transposed": False}),
        ("dbrx", {"flat": True}),
        ("qwen3_moe", {"transposed": False, "concatenated": True, "gated": True, "biased": False, "flat": False}),
    ],
)
def test_layouts(name: str, expected: dict[str, bool]) -> None:
    """Each way of storing experts is read off the module."""
    params = find_sites(zoo.build(name))[0].params
    assert {key: getattr(params, key) for key in expected} == expected


def test_conventions_and_specialities() -> None:
    """llama4 is called with scaled rows, longcat_flash has identity experts, muse_spark a norm after each expert."""
    assert find_sites(zoo.build("llama4"))[0].convention is Convention.SCALED_ROWS
    assert find_sites(zoo.build("longcat_flash"))[0].identity_experts
    assert find_sites(zoo.build("muse_spark"))[0].spec.post_norm is not None
    assert find_sites(zoo.build("nemotron_h"))[0].spec.activation.kind is Act.RELU2


def test_tied_experts_are_stored_once() -> None:
    """Two modules that share parameters would else pack tensors that the first has already given up."""
    model = zoo.build("diffusion_gemma")
    moebius.patch(model, device="cpu")
    layers = [module.__dict__["_moebius"] for module in model.modules() if "_moebius" in module.__dict__]
    stores = {layer.store.records.data_ptr() for layer in layers}
    assert len(stores) == len(layers) // 2
    moebius.unpatch(model)


def test_refusal_names_what_the_model_is() -> None:
    """A dense model and an unsupported MoE need different advice."""
    with pytest.raises(ValueError, match="dense model"):
        moebius.patch(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="expert options in its configuration"):
        moebius.patch(zoo.build("jetmoe"))


def test_experts_without_a_kernel_are_named_in_the_statistics() -> None:
    """A norm after each expert leaves all of the layer to torch, which nobody would see otherwise."""
    for name, expected in (("muse_spark", 2), ("qwen3_moe", 0)):
        model = moebius.patch(zoo.build(name), device="cpu")
        assert sum("torch code" in note for note in moebius.stats(model).notes) == expected
