"""Find the routed experts of any model, and prove for each that it is understood before it is taken over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moebius.hf_plugin.discovery.activations import recognise
from moebius.hf_plugin.discovery.adapters import Convention, ExpertParams, convention, expert_params
from moebius.kernels.experts import Act, Activation, ExpertSpec, ExpertWeights
from moebius.kernels.formats import FLOATS
from moebius.kernels.reference import moe_forward
from moebius.kernels.routes import build_routes

PROBE_TOKENS = 3
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
# ||ours - stock|| / ||stock|| of a layer's output on random inputs; a wrong layout or formula gives about 1
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class ExpertsSite:
    """One experts module that can be taken over.

    Args:
        name: its path in the model.
        module: the module itself, whose forward is replaced.
        owner: the module that has the weights: `module` or a child of it.
        params: how it holds them.
        convention: how it is called.
        spec: what an expert computes.
        identity_experts: whether ids from E upwards mean "the expert that returns its input".
        coded: the format of its weights in a quantised checkpoint that it is loaded from, if they are kept so.
    """

    name: str
    module: nn.Module
    owner: nn.Module
    params: ExpertParams
    convention: Convention
    spec: ExpertSpec
    identity_experts: bool
    coded: str | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by parameter name."""
        return self.params.tensors(self.owner)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors().values())).dtype

    @property
    def kind(self) -> object:
        """Equal for modules that compute the same way; one of each kind is verified."""
        return type(self.module), self.convention, self.spec.activation, replace(self.params, num_experts=0)

    @property
    def identity(self) -> int:
        """Equal for modules that share their parameters."""
        return id(self.owner._parameters[self.params.names[-1]])


def find_sites(model: nn.Module, loaded: bool = True) -> list[ExpertsSite]:
    """All routed experts of `model` in the order of its modules, verified one by one.

    Args:
        loaded: whether the weights are there; if not, `verify_once` is due when they are.

    Raises:
        ValueError: there are none, or some cannot be taken over; the message names the module, the cause and a remedy.
    """
    sites: list[ExpertsSite] = []
    verified: set[object] = set()
    for name, module in model.named_modules():
        found = expert_params(module)
        if found is None or (call := convention(module)) is None:
            continue
        owner, params = found
        _check_state(model, name, module, owner, params.tensors(owner), loaded)
        spec = _spec(module, owner, params)
        site = ExpertsSite(name, module, owner, params, call, spec, bool(getattr(module, "zero_expert_num", 0)))
        if loaded:
            verify_once(site, verified)
        sites.append(site)
    if not sites:
        raise ValueError(_nothing_found(model))
    return sites


def _nothing_found(model: nn.Module) -> str:
    kind = type(model).__name__
    config = getattr(model, "config", None)
    own = {} if config is None else {key: value for key, value in vars(config).items() if not key.startswith("_")}
    looks_moe = [key for key, value in own.items() if "expert" in key and value]
    if looks_moe:
        return (
            f"{kind} has expert options in its configuration ({', '.join(sorted(looks_moe)[:4])}), but no module that "
            "holds its experts as packed tensors called as experts(hidden, ids, weights); this architecture is not "
            "supported, and the model is unchanged"
        )
    return f"{kind} has no routed experts: it is a dense model, which runs as it is and needs no patch"


def _check_state(
    model: nn.Module,
    name: str,
    module: nn.Module,
    owner: nn.Module,
    tensors: dict[str, torch.Tensor],
    loaded: bool,
) -> None:
    where = f"experts module {name!r}"
    if getattr(module, "_is_expert_parallel", False) or _is_distributed(tensors):
        raise ValueError(f"{where} is split over processes (tensor or expert parallel); load the model without tp_plan")
    if "parametrizations" in module._modules or _lora_on_experts(model, name):
        raise ValueError(
            f"{where} carries an adapter on its expert weights, which Moebius would ignore; merge it "
            "(merge_and_unload) or remove it, then patch"
        )
    for key, tensor in tensors.items():
        if loaded and tensor.device.type == "meta":
            raise ValueError(f"{where} has no data: {key} is on the meta device; load the weights before patching")
        if tensor.dtype not in FLOATS.values():
            raise ValueError(
                f"{where} stores {key} as {tensor.dtype}; supported are fp32, bf16 and fp16: load the model with "
                'dtype="auto" unquantised, or dequantised'
            )
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise ValueError(f"{where} mixes dtypes in its expert weights; convert them to one dtype, then patch")


def _is_distributed(tensors: dict[str, torch.Tensor]) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _lora_on_experts(model: nn.Module, name: str) -> bool:
    """Whether an adapter wraps the module: peft nests it as `....base_layer` beside its own parameters."""
    while ".base_layer" in f".{name}":
        name = name.rpartition(".base_layer")[0] if ".base_layer" in name else ""
        if hasattr(model.get_submodule(name), "parameter_name"):
            return True
    return False


def _spec(module: nn.Module, owner: nn.Module, params: ExpertParams) -> ExpertSpec:
    apply = _gate_function(module, owner, params)
    activation = recognise(apply, params.gated, module)
    return ExpertSpec(
        params.hidden,
        params.intermediate,
        params.gated,
        params.biased,
        activation or Activation(Act.CUSTOM),
        custom=None if activation else apply,
        post_norm=module.get_submodule("post_expert_norm") if getattr(module, "has_post_expert_norm", False) else None,
    )


def _gate_function(module: nn.Module, owner: nn.Module, params: ExpertParams) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's own code from [n, 2I] (gates, then ups; [n, I] where ungated) to [n, I]."""
    own = getattr(module, "_apply_gate", None)
    if own is not None and params.gated:
        if params.concatenated:
            return own
        return lambda rows: own(rows.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))
    names, owners = ("act_fn", "activation_fn"), (module, owner)
    # a module that names no function computes inline: most likely SiLU, which the probe confirms or refuses
    function = next((f for o in owners for name in names if (f := getattr(o, name, None))), F.silu)
    if not params.gated:
        return function

    def gated(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return function(gate) * up

    return gated


def verify_once(site: ExpertsSite, verified: set[object]) -> None:
    """Prove that a site computes what its layout says, unless one of its kind is in `verified` already.

    Raises:
        ValueError: it computes something else.
    """
    if site.kind not in verified:
        _verify(site)
        verified.add(site.kind)


def probe_ids(num_experts: int) -> torch.Tensor:
    """The experts that `verify_once` routes its tokens to, int64 [PROBE_TOKENS, 1 or 2]."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randperm(num_experts, generator=generator, device="cpu")[:PROBE_TOKENS]  # the fewer, the quicker
    return torch.stack([few.roll(-token)[:2] for token in range(PROBE_TOKENS)])


def _verify(site: ExpertsSite) -> None:
    """Run the module's own forward on a few random tokens and compare: refuse a surprise, never compute it wrongly."""
    device = next(iter(site.tensors().values())).device
    generator = torch.Generator().manual_seed(0)
    e, h = site.params.num_experts, site.params.hidden
    x = torch.randn(PROBE_TOKENS, h, generator=generator, **_PLAIN).to(device, site.dtype)
    ids = probe_ids(e)
    weights = torch.rand(ids.shape, generator=generator, **_PLAIN) + 0.5
    if site.identity_experts:
        ids[0, 0] = e
    stock = _stock(site, x, ids.to(device), weights.to(device)).double().cpu()
    ours = reference_output(site, x, ids, weights).double().cpu()
    error = (ours - stock).norm() / stock.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if torch.isfinite(stock).all() and not error <= PROBE_TOLERANCE[site.dtype]:
        raise ValueError(
            f"experts module {site.name!r} ({type(site.module).__name__}) computes something else than its layout says "
            f"(relative difference {error:.2g} on random inputs); it is not supported, and the model is unchanged"
        )


@torch.no_grad()
def _stock(site: ExpertsSite, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    forward = type(site.module).forward
    if site.convention is Convention.ROUTED:
        return forward(site.module, x, ids, weights.to(x.dtype)).reshape(x.shape)
    scores = torch.zeros(site.params.num_experts, len(x), 1, device=x.device, dtype=x.dtype)
    scores[ids.T, torch.arange(len(x), device="cpu")] = weights.T[..., None].to(x.dtype)
    return forward(site.module, (x * scores).flatten(0, 1)).view(*scores.shape[:2], -1).sum(0)


@torch.no_grad()
def reference_output(site: ExpertsSite, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the site should give by its spec, in float32 [T, H]."""
    e, experts = site.params.num_experts, site.params.views(site.tensors())
    weights = weights.to(x.dtype).float()
    out = torch.zeros(x.shape, device=x.device, dtype=torch.float32)
    if site.identity_experts:
        out += x.float() * (weights * (ids >= e)).sum(-1, keepdim=True).to(x.device)
    if site.convention is Convention.SCALED_ROWS:  # the score scales the input
        for rank in range(ids.shape[1]):
            scaled = x * weights[:, rank, None].to(x.device, x.dtype)
            _add_experts(site, experts, scaled, ids[:, rank, None], np.ones((len(x), 1), np.float32), out)
    else:
        _add_experts(site, experts, x, ids, weights.numpy(), out)
    return out


def _add_experts(
    site: ExpertsSite,
    experts: dict[str, torch.Tensor],
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: np.ndarray,
    out: torch.Tensor,
) -> None:
    e = site.params.num_experts
    routes = build_routes(np.minimum(ids.numpy(), e), weights, e)
    absent = dict.fromkeys(ExpertWeights._fields)
    active = [ExpertWeights(**absent | {name: part[i] for name, part in experts.items()}) for i in routes.experts]  # type: ignore[arg-type]
    moe_forward(site.spec, active, x, routes, out)
