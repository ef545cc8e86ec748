"""What `gpu_memory="auto"` leaves free on a device: room for KV cache and activations of the model's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, cache_utils

# One sequence of the model's longest context, at most this long: contexts of 100,000 tokens and more would leave no
# room for experts on most cards. Whoever needs more gives gpu_memory.
CONTEXT_TOKENS = 16384
PROMPT_TOKENS = 4096  # of it that go through a layer at once
# Rows of hidden states that attention and norms hold at once for each of them: residual, norm, queries, keys, values,
# their rotated copies (twice as wide in float32), attention output, projection.
HIDDEN_ROWS = 16
WORKSPACE_BYTES = 1 << 29  # libraries, kernels, fragmentation
UNKNOWN_BYTES = 1 << 30  # for a model without a configuration that tells

# transformers 5.17, which has no such class, keeps keys and values of all heads where attention is latent and indexed.
_EXPANDED = not hasattr(cache_utils, "BaseQuantizedLayer")
_STATELESS = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")  # layers whose state does not grow with the context
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that a model needs besides its weights, over all its devices.

    Args:
        tokens: length of the sequence.
        kv_bytes: keys and values of all layers.
        activation_bytes: the widest layer's, needed on every device.
    """

    tokens: int
    kv_bytes: int
    activation_bytes: int

    def on_device(self, share: float, free: int) -> int:
        """Bytes to leave free on a device with this share of the layers and `free` bytes; half of them at most."""
        wanted = int(share * self.kv_bytes) + self.activation_bytes
        return WORKSPACE_BYTES + min(wanted, max(0, free - WORKSPACE_BYTES) // 2)


def reserve_for(config: Any, itemsize: int) -> Reserve:
    """The reserve that a model's configuration asks for.

    A layer keeps ``2 * kv_heads * head_dim`` values for each token, or ``kv_lora_rank + qk_rope_head_dim`` where
    attention is latent, and a key of the indexer where that is sparse; within its window only where it slides, and none
    where it is linear.

    Args:
        config: of transformers; the reserve is `UNKNOWN_BYTES` for anything else.
        itemsize: bytes of the model's dtype.
    """
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None
    count, hidden = _number(text, "num_hidden_layers", "n_layers"), _number(text, "hidden_size", "d_model")
    if text is None or not count or not hidden:
        return Reserve(0, 0, UNKNOWN_BYTES)
    tokens = min(_number(text, "max_position_embeddings", "max_seq_len") or CONTEXT_TOKENS, CONTEXT_TOKENS)
    same = "sliding" if _number(text, "sliding_window") else "full"  # as transformers' caches take it
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [same] * count
    each = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * count
    kept = sum(
        _kept(each[i], kind, tokens) * (_width(each[i], hidden, kind) + _index_width(each[i], kind, i))
        for i, kind in enumerate(kinds[:count])
    )
    return Reserve(tokens, kept * itemsize, min(tokens, PROMPT_TOKENS) * _activations(text, hidden, itemsize))


def _kept(config: Any, kind: str, tokens: int) -> int:
    """Tokens that a layer of this kind keeps."""
    if any(word in kind for word in _STATELESS):
        return 0
    window = _number(config, "sliding_window") if "sliding" in kind else 0
    return min(tokens, window or tokens)


def _width(config: Any, hidden: int, kind: str) -> int:
    """Values that a layer keeps for each token."""
    heads = _number(config, "num_attention_heads", "n_heads") or 1
    if latent := _number(config, "kv_lora_rank"):
        if _EXPANDED and _number(config, "index_head_dim"):
            names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            return heads * sum(_number(config, name) for name in names)
        return latent + _number(config, "qk_rope_head_dim")
    keys = _number(config, "num_key_value_heads") or heads
    width = _number(config, "head_dim") or hidden // heads
    if "sliding" not in kind:  # Gemma's layers of full attention may have other heads
        keys = max(keys, _number(config, "num_global_key_value_heads"))
        width = max(width, _number(config, "global_head_dim"))
    return 2 * keys * width


def _index_width(config: Any, kind: str, layer: int) -> int:
    """Values of the keys by which sparse attention finds each token; layers that share another's choice have none.

    Where keys are pooled (DSA), each has a gate of its width and a mark beside it.
    """
    if "indexed" in kind and (heads := _number(config, "indexer_kv_heads")):
        return heads * _number(config, "indexer_head_dim")
    kinds = getattr(config, "indexer_types", None)
    if (kinds is not None and kinds[layer] == "shared") or not _number(config, "kv_lora_rank"):
        return 0
    width = _number(config, "index_head_dim")
    return 2 * width + 1 if _number(config, "index_kpool") else width


def _activations(config: Any, hidden: int, itemsize: int) -> int:
    """Bytes for each token: rows of hidden states, and for each of its experts two rows in float32."""
    return HIDDEN_ROWS * hidden * itemsize + (_number(config, *_TOP_K) or 8) * 2 * hidden * 4


def _number(config: Any, *names: str) -> int:
    """The first of these fields that is a positive number, else 0."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
