"""Text, tokenizer, baselines and evaluation of the tiny Mixture-of-Experts model that `train_tiny_moe.py` trains.

The text is the Python standard library's own sources, split into training and held-out files by a hash of their names.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512  # tokens the model is trained and evaluated with
# Tests are not on every machine, character tables are not language, and build settings differ between machines.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by file name relative to the standard library's folder."""

    train: dict[str, str]
    held_out: dict[str, str]


def is_held_out(name: str) -> bool:
    """Tell whether a file belongs to the held-out text: one in 16 by the SHA-256 of its relative name."""
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


def read_corpus() -> Corpus:
    """Read the standard library's Python files that decode as UTF-8."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    corpus = Corpus({}, {})
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(name.parts) or name.as_posix().startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a handful of files declare another encoding
            continue
        (corpus.held_out if is_held_out(name.as_posix()) else corpus.train)[name.as_posix()] = text
    return corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer of `vocab_size` tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2 * CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[np.ndarray]:
    """Encode each text as int64 token ids that start with the end-of-text token."""
    first = tokenizer.eos_token_id
    return [np.array([first, *ids], dtype=np.int64) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def bigram_bits(
    train: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    vocab_size: int,
    strengths: Sequence[float] = (1, 3, 10, 30, 100, 300, 1000),
) -> float:
    """Total bits of `held_out` under a bigram model interpolated with an add-one unigram model.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k). The strength k is the best of `strengths` *on the held-out
    text*, which favours this baseline.
    """
    pairs = np.zeros((vocab_size, vocab_size))
    for ids in train:
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + vocab_size)
    before = np.concatenate([ids[:-1] for ids in held_out])
    after = np.concatenate([ids[1:] for ids in held_out])
    seen, total = pairs[before, after], pairs.sum(1)[before]
    return min(float(-np.log2((seen + k * unigram[after]) / (total + k)).sum()) for k in strengths)


def as_bytes(texts: Iterable[str]) -> list[np.ndarray]:
    """Encode each text as its UTF-8 bytes behind a zero byte that stands for its start."""
    return [np.frombuffer(b"\0" + text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Total bits of a text under a model, and routes per expert [layers, experts]."""

    bits: float
    load: np.ndarray


@dataclass(frozen=True, slots=True)
class RoutingUse:
    """How one layer spreads held-out tokens over its experts; entropy is relative to a uniform load (1.0)."""

    layer: int
    experts_used: int
    load_entropy: float
    largest_load: float


@torch.inference_mode()
def evaluate(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> Evaluation:
    """Predict every token of each sequence but its first, in windows of CONTEXT tokens without overlap."""
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    windows = [ids[i : i + CONTEXT + 1] for ids in sequences for i in range(0, len(ids) - 1, CONTEXT)]
    windows.sort(key=len)
    bits, load = 0.0, torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.int64)
    for first in track(range(0, len(windows), 8), description="evaluating"):
        rows = [torch.from_numpy(ids) for ids in windows[first : first + 8]]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        target = torch.nn.utils.rnn.pad_sequence([r[1:] for r in rows], batch_first=True, padding_value=-100)
        output = model(batch[:, :-1], use_cache=False, output_router_logits=True)
        nats = F.cross_entropy(output.logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
        bits += nats.item() / math.log(2)
        real = target.flatten() >= 0
        for layer, logits in enumerate(output.router_logits):
            load[layer] += torch.bincount(logits[real].topk(top_k).indices.flatten(), minlength=experts)
    return Evaluation(bits, load.numpy())


def routing_use(load: np.ndarray) -> list[RoutingUse]:
    """Summarise routes per expert [layers, experts]; an expert counts as used from a tenth of the uniform share on."""
    rows = []
    for layer, share in enumerate(load / load.sum(1, keepdims=True)):
        positive = share[share > 0]
        entropy = float(-(positive * np.log(positive)).sum() / math.log(share.size))
        used = int((share * share.size >= 0.1).sum())
        rows.append(RoutingUse(layer, used, round(entropy, 4), round(float(share.max()) * share.size, 3)))
    return rows
