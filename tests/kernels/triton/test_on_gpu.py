"""The kernels on a device, at sizes that the interpreter cannot afford."""

from __future__ import annotations

import pytest
import torch

from moebius.kernels.triton import experts
from moebius.kernels.triton.config import built_in
from moebius.kernels.triton.decode import decode
from moebius.kernels.triton.tables import pair_table, sender
from tests.kernels.triton.cases import ACTIVATIONS, Case, error, make_case, random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# bf16 and fp16 round the operands of the second product, as stock does
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3, "int8": 1e-5, "int4": 2e-5}


def run(case: Case) -> torch.Tensor:
    on_device = case.to("cuda")
    return experts.moe_forward(
        on_device.spec, on_device.layout, on_device.pool, on_device.x, on_device.routes, on_device.slots
    )


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 300])
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 768), (1000, 333)])
def test_shapes(tokens, format, hidden, intermediate):
    case = make_case(random_ids(tokens, 4, 16), hidden, intermediate, 16, format=format)
    assert error(run(case), case.expected()) < TOLERANCE[format]


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4", "int4-1x128-fp16-zeros"])
def test_quantised_records_on_tensor_cores(format, dtype, bound, tokens):
    """Weights unpacked to the type of narrow inputs."""
    case = make_case(random_ids(tokens, 4, 16), 1000, 333, 16, format=format, dtype=dtype)
    assert error(run(case), case.expected()) < bound


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_activations(name, gated, tokens):
    case = make_case(random_ids(tokens, 2), 256, 192, gated=gated, activation=ACTIVATIONS[name])
    assert error(run(case), case.expected()) < 1e-5


@pytest.mark.parametrize("tokens", [4, 64])
def test_runs_agree_bitwise(tokens):
    """Atomics, or a race between launches."""
    case = make_case(random_ids(tokens, 4), 512, 256, format="bf16").to("cuda")
    arguments = (case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    first = experts.moe_forward(*arguments)
    assert all(torch.equal(first, experts.moe_forward(*arguments)) for _ in range(20))


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_launches_wait_for_each_other(format):
    """A kernel that starts early and reads what is not there yet, or writes over what is still read.

    In a graph, since the host is too slow to have the next launch ready before the last one ends.
    """
    case = make_case(random_ids(1, 8, 16), 2048, 768, 16, format=format, dtype=torch.bfloat16).to("cuda")
    table = pair_table(case.routes, case.slots, 1, sender(case.x.device))
    tile = built_in(case.layout.code, "decode")
    inputs = [case.x, -2 * case.x]
    expected = [decode(case.spec, case.layout, case.pool, x, table, tile) for x in inputs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [decode(case.spec, case.layout, case.pool, inputs[i % 2], table, tile) for i in range(40)]
    for _ in range(10):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(result, expected[i % 2]) for i, result in enumerate(results))
