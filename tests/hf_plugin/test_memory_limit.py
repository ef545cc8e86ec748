"""A limit that the system enforces: a model whose experts exceed it runs with `cpu_memory`, and not without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moebius.hf_plugin.checkpoints import converting
from tests.conftest import RunPython

resource = pytest.importorskip("resource", reason="limits of a process are set by POSIX' setrlimit")

ROOT = Path(__file__).parents[2]
ALLOWED = 320 << 20  # bytes of private memory beyond what the imports took, for experts and all else
CONFIG = Qwen3MoeConfig(
    hidden_size=512, moe_intermediate_size=512, num_experts=52, num_experts_per_tok=4, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=256, intermediate_size=512,
    dtype="bfloat16",
)  # fmt: skip
EXPERTS = 8 * 52 * 3 * 512 * 512 * 2  # bytes: twice what is allowed

LIMITED = """
import gc, json, os, resource
import torch, moebius
def private():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
def generate(folder, options):
    model = moebius.from_pretrained(folder, **options)
    ids = torch.arange(12)[None]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokens.tolist(), moebius.stats(model).sums
options = json.loads(os.environ["OPTIONS"])
generate("converted", {**options, "cpu_memory": "10MiB"})  # imports and compiles what it needs
gc.collect()
limit = private() + int(os.environ["ALLOWED"])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
tokens, sums = generate(os.environ["FOLDER"], options)
print(json.dumps({"tokens": tokens, "read": sums.disk_bytes, "hits": sums.ram_hits}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limited")
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(CONFIG).bfloat16()
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    model.save_pretrained(folder / "stock")
    converting.convert(folder / "stock", folder / "converted")
    return folder


def limited(folder: Path, name: str, run_python: RunPython, **options: object) -> dict[str, object]:
    facts = {"FOLDER": name, "OPTIONS": json.dumps(options), "ALLOWED": str(ALLOWED)}
    done = run_python(LIMITED, cwd=folder, path=(ROOT,), **facts)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux only")
def test_a_model_of_twice_the_limit(checkpoint: Path, run_python: RunPython) -> None:
    """The same tokens as from a whole load without a limit; with the limit a whole load fails, so that it is real."""
    assert EXPERTS > 1.9 * ALLOWED
    stock = Qwen3MoeForCausalLM.from_pretrained(checkpoint / "stock")
    ids = torch.arange(12)[None]
    want = stock.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
    got = limited(checkpoint, "converted", run_python, device="cpu", cpu_memory="100MiB", cpu_threads=1)
    assert got["tokens"] == want
    assert got["read"] > 0  # type: ignore[operator]
    assert got["hits"] > 0  # type: ignore[operator]
    with pytest.raises(AssertionError, match=r"(?i)memory"):
        limited(checkpoint, "stock", run_python, device="cpu", cpu_memory="1GB", cpu_threads=1)
