"""Which code computes an expert."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moebius.gpu_cache import executor
from moebius.gpu_cache.executor import make_executor, run_reference
from moebius.kernels.experts import Act, Activation, ExpertSpec, RecordLayout
from tests.gpu_cache.layers import HIDDEN, expected, make_layers, one_token, some

PLAIN = ExpertSpec(HIDDEN, 2)
CUSTOM = ExpertSpec(HIDDEN, 2, activation=Activation(Act.CUSTOM), custom=lambda both: both[:, :2])
NORMED = ExpertSpec(HIDDEN, 2, post_norm=lambda y: y)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("spec", "device", "interpreted", "code"),
    [
        (PLAIN, GPU, False, "moebius.kernels.triton.experts"),
        (PLAIN, CPU, True, "moebius.kernels.triton.experts"),
        (PLAIN, CPU, False, "moebius.gpu_cache.executor"),
        (CUSTOM, GPU, False, "moebius.gpu_cache.executor"),
        (CUSTOM, CPU, True, "moebius.gpu_cache.executor"),
        (NORMED, GPU, False, "moebius.gpu_cache.executor"),
    ],
)
def test_choice(monkeypatch, spec, device, interpreted, code):
    """Code of the model's own that a kernel would leave out; an emulated run that needs Triton."""
    monkeypatch.setattr(executor, "interpreted", lambda: interpreted)
    for format in ("fp32", "int4"):
        chosen = make_executor(spec, RecordLayout.of(spec, format), device)
        assert chosen.func.__module__ == code  # type: ignore[attr-defined]


def test_the_cache_imports_no_kernel():
    """Kernels read TRITON_INTERPRET when imported, and need Triton, which not every machine has."""
    code = "import sys, moebius.gpu_cache.cache; sys.exit('moebius.kernels.triton.experts' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        make_executor(PLAIN, RecordLayout.of(PLAIN, "fp32"), GPU)


def test_reference_reads_the_slots_it_is_given():
    layer = make_layers()[0]
    pool = layer.records[[3, 5, 0]]
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    got = run_reference(layer.spec, layer.layout, pool, x, one_token(some(0, 5)), some(2, 1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected(layer, x.float(), some(0, 5)))
