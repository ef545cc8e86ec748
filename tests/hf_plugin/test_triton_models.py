"""Whole models whose cached experts run through the Triton kernels themselves, in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RunPython
from tests.kernels.triton.test_kernels import run_interpreted

pytest.importorskip("triton")

CODE = """
import json, os, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
import moebius
from moebius.kernels.triton import experts
from tests import zoo

launches = 0
kernel = experts.moe_forward
def counted(*args, **kwargs):
    global launches
    launches += 1
    return kernel(*args, **kwargs)
experts.moe_forward = counted

model = zoo.build(os.environ["NAME"])
ids = zoo.inputs(model, batch=1, length=4)["input_ids"]
options = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
with torch.no_grad():
    stock = model(input_ids=ids).logits
    text = model.generate(ids, **options)
    moebius.patch(model, device="emulated", gpu_memory=1.0)
    errors = [float((model(input_ids=ids).logits - stock).abs().max() / stock.abs().max()) for _ in range(2)]
    same = bool((model.generate(ids, **options) == text).all())
hits = moebius.stats(model).to_dict()["hits"]
print(json.dumps({"errors": errors, "same": same, "launches": launches, "hits": hits}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "inkling2"])
def test_interpreted_kernels_give_stock_text(name: str, run_python: RunPython) -> None:
    """SwiGLU, clamped with biases, ungated, soft-capped: the kernels tested alone must also be called rightly."""
    root = Path(__file__).parents[2]
    found = json.loads(run_python(CODE, cwd=root, path=(root,), NAME=name, TRITON_INTERPRET="1").stdout)
    assert found["launches"] > 0
    assert found["hits"] > 0
    assert max(found["errors"]) <= 1e-5
    assert found["same"]


@pytest.mark.slow
def test_a_model_on_an_accelerator_whose_kernels_are_interpreted() -> None:
    """See `interpreted_accelerator.py`."""
    run_interpreted(Path(__file__).with_name("interpreted_accelerator.py"))
