"""A tiny random model of any architecture: its configuration's defaults with every size made small.

Windows, chunks and other lengths are `LENGTH` tokens: more than the self-check's texts have, as in real
configurations, and fewer than the probe's (tests/probe.py).
"""

import dataclasses
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.tiny import randomize

VOCABULARY = 128
END = 2
CONTEXT = 512
LENGTH = 24

SIZES: dict[int, tuple[str, ...]] = {
    16: ("index_n_heads",),  # with fewer, many scores are zero and equal ones are chosen at random
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"),
    CONTEXT: (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length",
        "model_max_length", "max_source_positions", "original_max_position_embeddings", "mem_len",
    ),
    LENGTH: (
        "sliding_window", "attention_chunk_size", "window_size", "local_attention", "floor_scale", "sliding_window_size",
        "attention_window_size", "keep_window_size", "log_scaling_n_floor", "index_topk", "rel_extent",
        "local_attention_window_len",
    ),
    32: (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "input_embedding_size",
        "output_embedding_size", "word_embed_proj_dim", "lru_width", "embedding_dim", "attention_hidden_size",
        "hidden_size_global", "backbone_hidden_size", "out_hidden_size", "pronunciation_embed_dim", "shape_embed_dim",
        "ple_embed_dim",
    ),
    64: (
        "intermediate_size", "moe_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff",
        "ffn_hidden_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "intermediate_size_mlp", "dense_intermediate_size", "shared_experts_intermediate_size", "d_inner", "d_ff",
        "feed_forward_size", "moe_shared_expert_intermediate_size", "mlp_dim", "audio_vocab_size",
        "encoder_hash_byte_group_vocab", "prompt_mid_dim",
    ),
    2: (
        "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
        "num_encoder_layers", "num_blocks", "depth", "num_experts_per_tok", "num_experts_per_token", "moe_topk",
        "moe_k", "moe_top_k", "num_key_value_heads", "kv_n_heads", "num_kv_heads", "swa_num_key_value_heads",
        "linear_num_key_heads", "n_group", "num_expert_group", "topk_group", "q_groups",
        "num_layers_per_stack", "altup_num_inputs", "o_groups", "n_langs",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "linear_num_value_heads",
        "linear_num_heads", "n_mamba_heads", "num_query_groups", "laurel_rank", "hidden_size_per_layer_input",
        "zero_expert_num", "gated_norm_rank", "hc_lowrank",
    ),
    8: (
        "head_dim", "global_head_dim", "swa_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank",
        "qk_rope_head_dim", "dim_head", "kv_channels", "d_kv", "d_head", "linear_key_head_dim", "linear_value_head_dim",
        "linear_head_dim", "index_head_dim", "attention_head_size", "mamba_d_state", "state_size", "ssm_state_size",
        "time_step_rank", "mamba_dt_rank", "rotary_dim", "o_lora_rank", "router_hidden_size", "d_rel", "adapter_rank",
        "mamba_chunk_size",
    ),
}  # fmt: skip
"""The tiny value of each size, by its name in Transformers' configurations."""

LAYER_KINDS = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "indexer_types",
    "block_types",
    "attention_layers",
)
"""The names under which configurations list what each layer is."""

NEEDED = ("num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok")
"""Sizes that some configurations leave open and their models need."""

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
DOTS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8}  # fmt: skip
QWEN4 = {"indexer_compress_ratio": 4, "indexer_budget": LENGTH, "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "gemma3n": {"text_config.num_kv_shared_layers": 5, "text_config.num_hidden_layers": 10},
    "gemma3n_text": {"num_kv_shared_layers": 5, "num_hidden_layers": 10},
    "gemma4_text": {"num_kv_shared_layers": 6, "num_hidden_layers": 12},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8},
    "dots1": {"n_shared_experts": 1},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xlm": {"causal": True},
    "doge": {"keep_window_size": CONTEXT},  # limits_of
    "moshi": {"sliding_window": CONTEXT},
    "dots3_note": {"vision_config.num_hidden_layers": 42, "vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 32, "audio_config.adapter_out_dim": 32, "audio_config.adapter_input_size": 32} | {f"text_config.{name}": value for name, value in DOTS.items()},
    "dots3_note_text": DOTS,
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {f"text_config.{name}": value for name, value in QWEN4.items()},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0, "text_config.num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0, "text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "esmc": {"num_key_value_heads": 4},
    "minimax": {"block_size": 8},
    "neomme": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 16), "num_buckets": 4, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    **{name: {"text_config.rope_parameters": ROPE} for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl", "ernie4_5_vl_moe", "cosmos3_edge", "hunyuan_vl")},
    "glm4v_moe": {"text_config.rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, "text_config.rope_parameters": ROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "step3p7": {"text_config.sliding_window": LENGTH},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
}  # fmt: skip
"""What a type of model needs beyond the sizes. Dotted names lie in a part's configuration."""

MAX_LAYERS = 8


def config_of(model_type: str, decoder: bool = True) -> PreTrainedConfig:
    """The tiny configuration of a type of model. Without ``decoder`` the attention of BERT and its like looks both ways,
    and BART and its like have an encoder."""
    kind = CONFIG_MAPPING[model_type]
    arguments = _small(kind)
    if decoder and "is_decoder" in {field.name for field in dataclasses.fields(kind)}:
        arguments["is_decoder"] = True
        if model_type == "big_bird":
            arguments["attention_type"] = "original_full"  # limits_of
    for name, value in CHANGES.get(model_type, {}).items():
        *parts, last = name.split(".")
        target = arguments
        for part in parts:
            target = target[part]
        target[last] = value
    return kind(**arguments)


def build(model_type: str, auto: Any = AutoModelForCausalLM, decoder: bool = True) -> PreTrainedModel:
    """A float32 model with random weights large enough that its choices differ from each other. ``auto`` is an Auto
    class of Transformers."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config_of(model_type, decoder)).eval()
    if not decoder and not hasattr(model.config, "decoder_start_token_id"):
        model.config.decoder_start_token_id = 1  # T5's classifiers need one
    # Without what a configuration forces on generate, such as an end at max_length.
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=END, pad_token_id=0, decoder_start_token_id=None if decoder else 1
    )
    return randomize(model)


def _small(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    names = {field.name: field for field in dataclasses.fields(kind)}
    tiny = {name: size for size, several in SIZES.items() for name in several}
    arguments: dict[str, Any] = {}
    for name, field in names.items():
        if name in tiny and (field.default is not None or name in NEEDED):
            arguments[name] = tiny[name]
    special = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    arguments |= {name: value for name, value in special.items() if name in names}
    parts: dict[str, Any] = kind.sub_configs
    for name, part in parts.items():
        if part is AutoConfig and (kind_of_part := kind.sub_configs_defaults[name].model_type):
            part = CONFIG_MAPPING[kind_of_part]
        if hasattr(part, "__dataclass_fields__"):
            arguments[name] = _small(part)
            if "model_type" in {field.name for field in dataclasses.fields(part)}:
                arguments[name]["model_type"] = part.model_type
    if "kv_lora_rank" in names and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = 4  # latent attention has no grouped heads
    if "num_hidden_layers" in names:
        arguments["num_hidden_layers"] = _layers(kind)
    return arguments


def _layers(kind: type[PreTrainedConfig]) -> int:
    """How many layers hold one of each kind."""
    try:
        default = kind()
    except Exception:
        return 2
    layers = 2
    for name in LAYER_KINDS:
        kinds = getattr(default, name, None)
        if isinstance(kinds, list | tuple) and kinds:
            layers = max(layers, max(list(kinds).index(each) for each in set(kinds)) + 1)
    return min(layers, MAX_LAYERS)
