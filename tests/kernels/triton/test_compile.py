"""What the interpreter accepts must also compile: all launches of a layer, for real targets, without a GPU."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moebius.kernels.triton import experts
from moebius.kernels.triton.config import DECODE_TOKENS, INTERPRETED, DecodeTile, built_in, candidates, token_class
from tests.kernels.triton.cases import ACTIVATIONS, make_case, random_ids

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")]

# Shared memory that a block may use on the smallest card of the generation, bytes
TARGETS = {
    "turing": (GPUTarget("cuda", 75, 32), 64 << 10),
    "ampere": (GPUTarget("cuda", 80, 32), 163 << 10),
    "ada": (GPUTarget("cuda", 89, 32), 99 << 10),
    "hopper": (GPUTarget("cuda", 90, 32), 227 << 10),
    "mi300": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class NoDriver:
    """Stands for a GPU of some target that nothing is launched on."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: object = None) -> int:
        return 0


def compile_for(monkeypatch: pytest.MonkeyPatch, target: GPUTarget) -> None:
    """Let launches compile for a device that is not there."""
    name = "_active" if hasattr(driver, "_active") else "active"  # the latter until Triton 3.5
    monkeypatch.setattr(driver, name, NoDriver(target))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[tuple[str, Any]]:
    """Launches compile and are listed as (kernel, compiled) instead of run."""
    compiled: list[tuple[str, Any]] = []

    def launcher(kernel: JITFunction, grid: object) -> Any:
        return lambda *args, **kwargs: compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compiled


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS + 1], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("target", "format"),
    [("turing", "fp32"), ("turing", "fp16"), ("ada", "fp32"), ("ada", "bf16"), ("hopper", "bf16"), ("mi300", "bf16")],
)
def test_kernels_compile(launches, monkeypatch, target, format, tokens):
    """Code that only the interpreter understands, or a tile too large for the card."""
    device, shared = TARGETS[target]
    compile_for(monkeypatch, device)
    case = make_case(random_ids(tokens, 2), 256, 96, activation=ACTIVATIONS["gpt_oss"], format=format)
    experts.moe_forward(case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    assert len(launches) == (2 if tokens == 1 else 3)
    for name, kernel in launches:
        assert kernel.metadata.shared <= shared, name


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS + 1], ids=["decode", "prefill"])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4", "int4-1x128-fp16-zeros"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantised_kernels_compile(launches, monkeypatch, target, format, tokens):
    """Records whose weights are unpacked in registers, with inputs in the type that the card computes fastest."""
    device, shared = TARGETS[target]
    compile_for(monkeypatch, device)
    dtype = torch.float16 if target == "turing" else torch.bfloat16
    case = make_case(random_ids(tokens, 2), 256, 96, format=format, dtype=dtype)
    experts.moe_forward(case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    assert len(launches) == (2 if tokens == 1 else 3)
    for name, kernel in launches:
        assert kernel.metadata.shared <= shared, name


def compile_tile(launches: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, case: Any, tile: Any) -> list[Any]:
    """The experts' kernels of a launch with that tile."""
    before = len(launches)
    monkeypatch.setattr(experts, "tile_for", lambda *_: tile)
    experts.moe_forward(case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    return [kernel for name, kernel in launches[before:] if name != "combine_kernel"]


def spilled_bytes(kernel: Any, folder: Any) -> int:
    """Bytes of values that a thread keeps in memory for lack of registers."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.partition("STACK:")[2].split()[0])


def large_case(format: str, tokens: int) -> Any:
    """Of the size that the built-in tiles are made for."""
    return make_case(np.zeros((tokens, 1), np.int64), 2048, 768, 1, biased=False, format=format, dtype=torch.bfloat16)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("target", ["ampere", "ada", "hopper"])
def test_decode_reads_as_a_memory_wants_to_be_read(launches, monkeypatch, tmp_path, target, format):
    """Narrow loads, values that spill, inputs that threads exchange, or codes converted at 16 a cycle."""
    compile_for(monkeypatch, TARGETS[target][0])
    case = large_case(format, 1)
    tiles = candidates(case.layout.code, "decode") if target == "hopper" else [built_in(case.layout.code, "decode")]
    for tile in tiles:
        assert isinstance(tile, DecodeTile)
        up, down = compile_tile(launches, monkeypatch, case, tile)
        weights = 2 * tile.rows * tile.units // (32 * tile.warps)  # 16 bytes each
        down_weights = tile.down_rows * tile.down_pairs * tile.down_units // (32 * tile.down_warps)
        for kernel, loads in ((up, weights), (down, down_weights)):
            code = kernel.asm["ptx"]
            assert spilled_bytes(kernel, tmp_path) == 0, tile
            assert code.count("ld.global.v4.b32") >= loads, tile
            assert kernel.metadata.shared <= 4096, f"{tile}: more than the last sum takes"
            assert "cvt.rn.f32.s" not in code
            assert "cvt.rn.f32.u" not in code
        before, waits, _ = down.asm["ptx"].partition("griddepcontrol.wait")
        assert bool(waits) == (target == "hopper")
        if waits:
            assert before.count("ld.global.v4.b32") == down_weights, (
                "waits for the first half before it asks for weights"
            )


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", ["batch", "prompt"])
@pytest.mark.parametrize("target", ["ampere", "ada", "hopper"])
def test_prefill_uses_tensor_cores_and_loads_ahead(launches, monkeypatch, tmp_path, target, tokens, format):
    """Products on ordinary cores, or of operands that are waited for."""
    device, shared = TARGETS[target]
    compile_for(monkeypatch, device)
    case = large_case(format, 300)
    tile = built_in(case.layout.code, tokens, shared)
    for kernel in compile_tile(launches, monkeypatch, case, tile):
        code = kernel.asm["ptx"]
        assert ("wgmma.mma_async" if target == "hopper" and tokens == "prompt" else "mma.sync") in code
        assert "cp.async" in code
        assert spilled_bytes(kernel, tmp_path) == 0
        assert kernel.metadata.shared <= shared


@pytest.mark.parametrize("format", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("target", ["ada", "hopper"])
def test_exact_products_do_not_spill(launches, monkeypatch, tmp_path, target, format):
    """Inputs in fp32, which tensor cores would round: kilobytes of a thread's sums in memory."""
    compile_for(monkeypatch, TARGETS[target][0])
    case = large_case(format, 300)
    case = case._replace(x=case.x.float())
    experts.moe_forward(case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    assert [spilled_bytes(kernel, tmp_path) for _, kernel in launches] == [0, 0, 0]


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS + 1], ids=["decode", "batch"])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_tiles_that_tuning_tries_compile(launches, monkeypatch, format, tokens):
    """A candidate that is no power of two, smaller than a group, or too small for a product of tiles."""
    compile_for(monkeypatch, TARGETS["hopper"][0])
    case = make_case(random_ids(tokens, 2), 256, 96, format=format, dtype=torch.bfloat16)
    tried = candidates(case.layout.code, token_class(tokens))
    for tile in (tried[1], tried[-1]):  # the smallest and the largest
        assert len(compile_tile(launches, monkeypatch, case, tile)) == 2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_compile(launches, monkeypatch, name):
    compile_for(monkeypatch, TARGETS["ada"][0])
    gated = name != "relu2"
    case = make_case(random_ids(1, 2), 64, 64, gated=gated, activation=ACTIVATIONS[name], dtype=torch.float32)
    experts.moe_forward(case.spec, case.layout, case.pool, case.x, case.routes, case.slots)
    assert [kernel for kernel, _ in launches] == ["intermediate_kernel", "down_kernel"]
