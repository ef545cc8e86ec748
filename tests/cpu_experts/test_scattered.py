"""Experts whose tensors are wherever a file has them: the same numbers as from records, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import Act, Activation, ExpertSpec
from moebius.kernels.numba.arguments import describe

from .moe_layers import random_routes, random_store


def _scattered(store: ExpertStore, shift: int) -> ExpertStore:
    """The same weights, each tensor in memory of its own, `shift` bytes beyond a multiple of 64."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensors in store.parts.items():
        for tensor in tensors:
            memory = np.full(tensor.nbytes + 256, 0xFF, np.uint8)  # NaN around it
            start = -memory.ctypes.data % 64 + shift
            memory[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            storage = torch.from_numpy(memory).untyped_storage()[start : start + tensor.nbytes]
            view = torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)  # type: ignore[call-overload]
            parts.setdefault(name, []).append(view)
    return ExpertStore(store.spec, store.layout, store.num_experts, parts)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shift", [0, 1, 62])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (70, 33)])
def test_equals_records(
    executors: dict[int, CpuExecutor], format: str, shift: int, tokens: int, hidden: int, intermediate: int
) -> None:
    """Bug: an address reckoned from the first expert's, an aligned load, a read beyond a tensor's end."""
    spec = ExpertSpec(hidden, intermediate, biased=True, activation=Activation(Act.GELU_TANH))
    store, routes = random_store(spec, format, 5), random_routes(tokens, 3, 5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
        from_records, scattered = torch.zeros(tokens, hidden), torch.zeros(tokens, hidden)
        executors[2].run(store, x, routes, from_records)
        executors[2].run(_scattered(store, shift), x, routes, scattered)
        assert from_records.abs().max() > 0
        assert torch.equal(from_records, scattered)


def test_torch_code_computes_with_them_too(executors: dict[int, CpuExecutor]) -> None:
    """Bug: a model whose activation has no kernel asks for records."""
    spec = ExpertSpec(6, 5, activation=Activation(Act.CUSTOM), custom=lambda both: both[:, :5] * both[:, 5:].sin())
    store, routes, x = random_store(spec, "bf16", 4), random_routes(3, 2, 4), torch.randn(3, 6)
    results = [torch.zeros(3, 6), torch.zeros(3, 6)]
    for result, each in zip(results, (store, _scattered(store, 1)), strict=True):
        executors[1].run(each, x, routes, result)
    assert torch.equal(*results)


def test_other_tensors_than_the_layouts_are_refused() -> None:
    """Bug: compiled code reads beyond a tensor that is too small, or along strides that it does not know."""
    store = random_store(ExpertSpec(6, 5), "bf16", 3)
    good = {name: list(tensors) for name, tensors in store.parts.items()}
    bad = [
        {**good, "up": good["up"][:2]},
        {name: good[name] for name in ("up", "down")},
        {**good, "up": [*good["up"][:2], torch.empty(5, 6)]},
        {**good, "up": [*good["up"][:2], torch.empty(4, 6, dtype=torch.bfloat16)]},
        {**good, "up": [*good["up"][:2], torch.empty(6, 5, dtype=torch.bfloat16).mT]},
    ]
    for parts in bad:
        with pytest.raises(ValueError, match=r"as many of each|must be torch.bfloat16 \[5, 6\]"):
            describe(store.spec, store.layout, parts)
