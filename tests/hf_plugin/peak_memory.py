"""A checkpoint that is large enough to see copies of its experts, and what a process watches its own memory with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS = 8
LAYER_BYTES = 32 * 3 * 512 * 512 * 2  # of experts

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' memory accounting")

# For code in a process of its own: `peak` follows `anonymous()` from `watcher.start()` until `running` is False.
WATCH = """
import os, threading, time, torch, moebius
from transformers import AutoModelForCausalLM
import moebius.hf_plugin.checkpoints.loading, transformers.models.qwen3_moe.modeling_qwen3_moe
peak, running = 0, True
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    global peak
    while running:
        peak = max(peak, anonymous()); time.sleep(0.002)
watcher = threading.Thread(target=watch)
"""


def save_large(folder: Path) -> None:
    """Write a checkpoint of 403 MB of experts in bf16, without weights that are all alike."""
    config = Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=256, intermediate_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
