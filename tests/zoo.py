# ruff: noqa: C408  (field names read better as keywords, and the recipes are made of nothing else)
"""Tiny random-weight models of every Mixture-of-Experts architecture in transformers, built in memory.

Each entry is a recipe: the shared small sizes of ``SMALL`` for the fields that its config has, plus its own overrides.
Embedding 64, at most 4 layers, 8 experts, top-2 where the architecture allows; 0.01 to 8 million parameters, built in
about 20 ms each. Nothing is downloaded.
"""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 160

SMALL: dict[str, Any] = {
    # language model
    **dict(vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256, model_max_length=256),
    **dict(hidden_size=64, num_hidden_layers=2),
    **dict(intermediate_size=64, intermediate_size_mlp=64, dense_intermediate_size=64, hidden_size_per_layer_input=16),
    **dict(num_mtp_layers=0, num_nextn_predict_layers=0, hc_mult=2, hc_sinkhorn_iters=3, gated_norm_rank=4),
    # routed and shared experts
    **dict(num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8),
    **dict(num_experts_per_tok=2, moe_topk=2, moe_k=2, top_k_experts=2, n_group=1, topk_group=1),
    **dict(moe_intermediate_size=32, moe_hidden_size=32, router_hidden_size=16, share_expert_dim=32),
    **dict(n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, shared_intermediate_size=32),
    **dict(shared_expert_intermediate_size=32, shared_experts_intermediate_size=32),
    **dict(moe_shared_expert_intermediate_size=32, first_k_dense_replace=1, num_dense_layers=1),
    **dict(swiglu_limit=0.3, mlp_gate_softcap=0.5, mlp_up_softcap=0.5),  # low enough to bind on small random weights
    # attention
    **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, kv_channels=16, rotary_dim=16),
    **dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16),
    **dict(sliding_window=16, sliding_window_size=16, rel_extent=32, d_rel=8),
    **dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16),
    **dict(index_topk=8, index_head_dim=16, index_n_heads=2),
    # linear attention and state space layers
    **dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4),
    **dict(linear_head_dim=16, linear_num_heads=4, ssm_state_size=16, n_groups=2, chunk_size=16),
    **dict(mamba_n_heads=4, mamba_num_heads=8, mamba_d_state=16, mamba_head_dim=16, mamba_chunk_size=16),
    # vision and audio towers of multimodal models
    **dict(depth=1, out_hidden_size=64, num_heads=4, embed_dim=64, deepstack_visual_indexes=[0]),
    **dict(num_position_embeddings=16, patch_size=4, image_size=16, vision_output_dim=64),
    **dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=64, output_dim=64),
    **dict(projector_hidden_size=64, projector_input_dim=64, projector_output_dim=64),
    **dict(num_mel_bins=16, downsample_hidden_size=32),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """The recipe of one tiny model.

    Attributes:
        config: Name of the config class in transformers.
        model: Name of the model class in transformers.
        text: Overrides of the language model's config, in a multimodal model the one called ``text_config``.
        top: Overrides of the outermost config.
        variant_of: The architecture this entry shows a second form of (text only or multimodal), or None.
        generates: Whether the model has ``generate``.
        stochastic: Whether a forward draws random numbers, so that equal outputs need equal seeds.
        since: The transformers from which on this model is known to run, and to have packed experts.
    """

    config: str
    model: str
    text: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    variant_of: str | None = None
    generates: bool = True
    stochastic: bool = False
    since: str = "5.17"


def _causal(prefix: str, **text: Any) -> Entry:
    return Entry(f"{prefix}Config", f"{prefix}ForCausalLM", text)


def _conditional(prefix: str, **text: Any) -> Entry:
    return Entry(f"{prefix}Config", f"{prefix}ForConditionalGeneration", text)


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=1e4, mrope_section=section, **more)


def _vision(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return dict(model_type=model_type, **sizes, **more)


_IMAGE = dict(image_size=16, patch_size=4)
_MLA = dict(num_key_value_heads=4)  # multi-head latent attention wants as many key/value heads as query heads
_SPARSE_SECOND = dict(mlp_layer_types=["dense", "sparse"])

ENTRIES: dict[str, Entry] = {
    "afmoe": _causal("Afmoe"),
    "aria": Entry(
        "AriaConfig",
        "AriaForConditionalGeneration",
        top=dict(vision_config=_vision("idefics3_vision", **_IMAGE)),
        since="5.23",
    ),
    "aria_text": Entry("AriaTextConfig", "AriaTextForCausalLM", variant_of="aria", since="5.23"),
    "axk1": _causal("AXK1", **_MLA),
    "axk2": _causal("AXK2", **_MLA),
    "bailing_hybrid": _causal("BailingHybrid", num_hidden_layers=4, layer_group_size=2, **_MLA),
    "beam": _causal("Beam", **_SPARSE_SECOND),
    "cohere2_moe": _causal("Cohere2Moe"),
    "dbrx": _causal(
        "Dbrx",
        **dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=256),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=32, moe_num_experts=8, moe_top_k=2),
    ),
    "deepseek_ocr2": _conditional("DeepseekOcr2", **_SPARSE_SECOND),
    "deepseek_v2": _causal("DeepseekV2", **_MLA),
    "deepseek_v3": _causal("DeepseekV3", n_group=2, topk_group=1, **_MLA),
    "deepseek_v32": _causal("DeepseekV32", **_MLA),
    "deepseek_v4": _causal("DeepseekV4", num_hidden_layers=4, num_key_value_heads=1, o_groups=2, o_lora_rank=8),
    "diffusion_gemma": Entry(
        "DiffusionGemmaConfig",
        "DiffusionGemmaForBlockDiffusion",
        top=dict(canvas_length=16, vision_config=_vision("gemma4_vision", num_key_value_heads=4, head_dim=16)),
        stochastic=True,
    ),
    "doge": Entry("DogeConfig", "DogeForCausalLM", dict(is_moe=True, num_experts=16), since="5.23"),
    "dots1": _causal("Dots1"),
    "dots3_note": Entry("Dots3NoteTextConfig", "Dots3NoteForCausalLM", _MLA),
    "ernie4_5_moe": _causal("Ernie4_5_Moe"),
    "ernie4_5_vl_moe": _conditional(
        "Ernie4_5_VLMoe", moe_intermediate_size=[32, 16], head_dim=16, rope_parameters=_mrope([3, 3, 2])
    ),
    "exaone_moe": _causal("ExaoneMoe"),
    "flex_olmo": _causal("FlexOlmo"),
    "flint": _causal("Flint", num_hidden_layers=3),
    "gemma4": Entry("Gemma4TextConfig", "Gemma4ForCausalLM", dict(enable_moe_block=True)),
    "gemma4_mm": Entry(
        "Gemma4Config", "Gemma4ForConditionalGeneration", dict(enable_moe_block=True), variant_of="gemma4"
    ),
    "glm4_moe": _causal("Glm4Moe"),
    "glm4_moe_lite": _causal("Glm4MoeLite", **_MLA),
    "glm4v_moe": _conditional("Glm4vMoe", rope_parameters=_mrope([2, 1, 1], partial_rotary_factor=0.5)),
    "glm5_next": _conditional(
        "Glm5Next",
        **dict(qk_rope_head_dim=0, index_topk=16, layer_types=["linear_attention", "full_attention"]),
        **_SPARSE_SECOND,
        **_MLA,
    ),
    "glm_moe_dsa": _causal("GlmMoeDsa", **_MLA),
    "gpt_oss": _causal("GptOss"),
    "granitemoe": _causal("GraniteMoe"),
    "granitemoe_swa": _causal("GraniteMoeSWA"),
    "granitemoehybrid": _causal(
        "GraniteMoeHybrid", mamba_n_heads=8, mamba_d_head=16, layer_types=["mamba", "attention"]
    ),
    "granitemoeshared": _causal("GraniteMoeShared"),
    "hunyuan_v1_moe": Entry("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM"),
    "hy_v3": _causal("HYV3"),
    "hy_v4": _causal("HYV4"),
    "inkling": Entry("InklingTextConfig", "InklingForCausalLM"),
    "inkling2": Entry("Inkling2TextConfig", "Inkling2ForCausalLM"),
    "jamba": _causal("Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "jetmoe": _causal("JetMoe"),
    "kimi_linear": _causal("KimiLinear", layer_types=["linear_attention", "full_attention"], **_MLA),
    "kolibri1": _causal("Kolibri1"),
    "laguna": _causal("Laguna"),
    "lfm2_moe": _causal("Lfm2Moe", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "llama4": Entry("Llama4TextConfig", "Llama4ForCausalLM"),
    "llama4_mm": Entry("Llama4Config", "Llama4ForConditionalGeneration", variant_of="llama4"),
    "longcat_flash": _causal(
        "LongcatFlash",
        **dict(num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2, head_dim=8),
        **_MLA,
    ),
    "mellum": _causal("Mellum"),
    "mimo_v2_flash": _causal("MiMoV2Flash"),
    "minimax": _causal("MiniMax", block_size=16),
    "minimax_m2": _causal("MiniMaxM2"),
    "minimax_m3_vl": Entry(
        "MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", dict(index_block_size=8, index_topk_blocks=2)
    ),
    "mistral4": _causal("Mistral4", **_MLA),
    "mistral_large4": Entry(
        "MistralLarge4Config",
        "MistralLarge4ForConditionalGeneration",
        _MLA,
        dict(vision_config=_vision("pixtral", **_IMAGE)),
    ),
    "mixtral": _causal("Mixtral"),
    "muse_spark": Entry(
        "MuseSparkConfig",
        "MuseSparkForConditionalGeneration",
        top=dict(audio_config=dict(num_hidden_layers=4, hidden_sizes=(16,) * 4, depths=(1,) * 4, out_hidden_size=64)),
    ),
    "nemotron_h": _causal("NemotronH", layers_block_type=["mamba", "moe", "attention", "moe"], moe_latent_size=32),
    "nllb_moe": _conditional(
        "NllbMoe",
        **dict(encoder_layers=2, encoder_sparse_step=2, encoder_ffn_dim=64, encoder_attention_heads=4),
        **dict(decoder_layers=2, decoder_sparse_step=2, decoder_ffn_dim=64, decoder_attention_heads=4),
    ),
    "olmoe": _causal("Olmoe"),
    "openai_privacy_filter": Entry(
        "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification", generates=False
    ),
    "phimoe": _causal("Phimoe"),
    "qwen2_moe": _causal("Qwen2Moe"),
    "qwen3_5_moe": Entry("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", dict(num_hidden_layers=4)),
    "qwen3_5_moe_mm": Entry(
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        dict(num_hidden_layers=4),
        variant_of="qwen3_5_moe",
    ),
    "qwen3_moe": _causal("Qwen3Moe"),
    "qwen3_next": _causal("Qwen3Next", num_hidden_layers=4),
    "qwen3_omni_moe": Entry(
        "Qwen3OmniMoeThinkerConfig",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        top=dict(vision_start_token_id=151652),
    ),
    "qwen3_vl_moe": _conditional("Qwen3VLMoe"),
    "qwen4_exp": Entry(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        dict(num_hidden_layers=4, hc_count=2, hc_lowrank=8)
        | dict(ngram_vocab_size_base=512, heads_per_ngram=2, split_ngram_parts=2, make_ngram_vocab_size_divisible_by=8)
        | dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4),
    ),
    "solar_open": _causal("SolarOpen"),
    "step3p7": _conditional(
        "Step3p7",
        **dict(layer_types=["full_attention", "sliding_attention"], swiglu_limits=[0.0, 0.3]),
        **_SPARSE_SECOND,
    ),
    "switch_transformers": _conditional(
        "SwitchTransformers",
        **dict(d_kv=16, d_ff=64, num_layers=2, num_heads=4, num_sparse_encoder_layers=1),
        **dict(num_decoder_layers=2, num_sparse_decoder_layers=1),
    ),
    "unlimited_ocr": _conditional("UnlimitedOcr"),
    "zaya": _causal("Zaya", num_experts_per_tok=1),
}


@functools.cache
def _classes(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
    entry = ENTRIES[name]
    config = getattr(transformers, entry.config, None)
    model = getattr(transformers, entry.model, None)
    old = Version(transformers.__version__) < Version(entry.since)
    return None if old or config is None or model is None else (config, model)


def available() -> list[str]:
    """Returns the names of the entries that the installed transformers has, and can run."""
    return [name for name in ENTRIES if _classes(name) is not None]


def missing() -> list[str]:
    """Returns the names of the entries that the installed transformers lacks, or cannot run."""
    return [name for name in ENTRIES if _classes(name) is None]


def architecture(name: str) -> str:
    """Returns the architecture of an entry: several entries may be forms of one."""
    return ENTRIES[name].variant_of or name


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds the tiny model of an entry, in eval mode, on the CPU.

    Args:
        name: A name from ``available()``.
        seed: Determines every parameter.
        dtype: Data type of the parameters, but for those that the architecture keeps in float32.

    Returns:
        The model. Its logits are of order 0.1 to 10, and every expert of a layer differs from the others.

    Raises:
        SkipTest: The installed transformers lacks the architecture.
    """
    classes = _classes(name)
    if classes is None:
        raise SkipTest(f"the installed transformers has no {ENTRIES[name].model}")
    config_class, model_class = classes
    torch.manual_seed(seed)
    config = config_class(**_sizes(config_class, ENTRIES[name]))
    with _default_dtype(dtype):
        model = model_class(config)
    _keep_float32(model)
    _randomise(model, seed)
    return model.eval()


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Random prompts for a forward of the model.

    Returns:
        ``input_ids`` [batch, length] int64; for encoder-decoders ``decoder_input_ids`` [batch, 4]; and where image
        tokens have experts of their own, a mask that calls the middle third of each prompt so.
    """
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    given = dict(input_ids=ids)
    if model.config.is_encoder_decoder:
        given |= dict(decoder_input_ids=ids[:, :4])
    if "moe_mm_token_type_ids" in inspect.signature(model.forward).parameters:
        position = torch.arange(length).expand(batch, -1)
        given |= dict(moe_mm_token_type_ids=((position >= length // 3) & (position < 2 * length // 3)).int())
    return given


def _sizes(config_class: type[PreTrainedConfig], entry: Entry) -> dict[str, Any]:
    if "text_config" in config_class.sub_configs:
        return _shrunk(config_class, entry.top, entry.text)
    return _shrunk(config_class, {**entry.text, **entry.top}, {})


def _shrunk(config_class: type[PreTrainedConfig], own: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name for base in config_class.__mro__ for name in vars(base).get("__annotations__", ())}
    sizes = {name: size for name, size in SMALL.items() if name in fields} | copy.deepcopy(dict(own))
    for name, sub_config in config_class.sub_configs.items():
        if name not in sizes and sub_config is not AutoConfig:
            sizes[name] = _shrunk(sub_config, text if name == "text_config" else {}, text)
    return sizes


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _keep_float32(model: PreTrainedModel) -> None:
    """Does what ``from_pretrained`` does with the parameters that an architecture wants in float32 at any dtype."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(pattern in name for pattern in kept):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    # The default init leaves biases at zero, norms at one and some routers constant: an executor that dropped a bias
    # or a norm, or that mixed up two experts, would go unnoticed.
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * (0.5 / parameter.shape[-1] ** 0.5))
        elif parameter.is_floating_point():
            parameter.add_(0.1 * noise)
    for name, table in model.named_buffers():
        if name.endswith(".tid2eid"):  # from token to experts, in hash routers; duplicates are legal and do occur here
            num_experts = vars(model.get_submodule(name.rpartition(".")[0]))["num_experts"]
            table.copy_(torch.randint(num_experts, table.shape, generator=generator))
