"""Tiny configurations of transformers' causal language models.

A configuration is shrunk by the common names of its fields (hidden sizes, heads, experts, vocabulary, ranks); there are as many layers as
it takes to have every layer type, at least two. What the names do not settle stands in `OVERRIDES`, one entry an architecture.

Routing is pinned by having every expert chosen (and every key of a sparse attention): then no rounding error can send a token elsewhere,
the numeric contract holds for the logits, and the graph is the one that the model always has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 32
LAYERS, VOCABULARY, POSITIONS, EXPERTS, RANK, WINDOW = 2, 256, 512, 4, 32, 16


def _names(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SHRUNK: dict[str, Any] = {
    **_names(HIDDEN, "hidden_size n_embd d_model emb_dim dim_model_base"),
    **_names(INTERMEDIATE, "intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    **_names(INTERMEDIATE, "ffn_hidden_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size"),
    **_names(64, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    **_names(64, "moe_shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_names(LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_blocks"),
    **_names(LAYERS, "num_decoder_layers num_encoder_layers"),
    **_names(HEADS, "num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    **_names(HEADS, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads"),
    **_names(KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    **_names(HEADS, "linear_num_value_heads n_mamba_heads"),
    **_names(HEAD_DIM, "head_dim swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim dim_head d_head"),
    **_names(HEAD_DIM, "qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels attention_head_size"),
    **_names(16, "rotary_dim ssm_state_size mamba_d_state router_hidden_size"),
    **_names(RANK, "q_lora_rank kv_lora_rank o_lora_rank"),
    **_names(2, "o_groups hc_count heads_per_ngram"),
    **_names(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_names(POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx context_length"),
    **_names(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_names(EXPERTS, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **_names(1, "n_group topk_group first_k_dense_replace num_dense_layers"),
    **_names(POSITIONS, "index_topk index_topk_blocks"),
    **_names(WINDOW, "sliding_window sliding_window_size attention_window_size local_attention"),
    **_names(0.08, "initializer_range init_std"),  # about 1/sqrt(HIDDEN): a layer's output is as large as its input
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

# Lists with one entry a layer: shrunk to one round through the kinds of layer that occur in the default configuration.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers", "indexer_types")

# What the names of the fields do not settle.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "doge": {"num_experts": 16},  # a square: the router is a product of two
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        **{f"swa_{name}": HEADS for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": HEAD_DIM for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 2 * HEAD_DIM,
        "head_dim": 2 * HEAD_DIM,
    },
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_chunk_size": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"intermediate_size": [INTERMEDIATE] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "hrm_text": {"H_cycles": 1, "L_cycles": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 0},
    "mamba2": {"num_heads": 8, "head_dim": 32, "chunk_size": 16, "n_groups": 1, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "phimoe": {"num_local_experts": 2, "num_experts_per_tok": 2},  # its router picks two, whatever the configuration says
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
    }
    | {"hc_lowrank": 16, "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
    "reformer": {"axial_pos_shape": (16, 32), "axial_pos_embds_dim": (64, 64)},
    "roc_bert": {"pronunciation_embed_dim": 32, "pronunciation_vocab_size": 64, "shape_embed_dim": 32, "shape_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def has_parts(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the configuration is put together from several (text, vision, audio): its text part is an architecture of its own."""
    return bool(getattr(config_class, "sub_configs", None))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of an architecture, by its `model_type`."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SHRUNK.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = HEADS
    values.update(_per_layer(config_class, fields))
    values.update(OVERRIDES.get(model_type, {}))
    return config_class(**values)


def _per_layer(config_class: type[PreTrainedConfig], fields: set[str]) -> dict[str, Any]:
    """The per-layer lists of the default configuration, cut to as many layers as it takes to have every kind, and that number."""
    default = config_class()
    kinds = {name: list(dict.fromkeys(getattr(default, name))) for name in PER_LAYER if name in fields and getattr(default, name, None)}
    if not kinds:
        return {}
    count = max(LAYERS, max(len(kind) for kind in kinds.values()))
    lists = {name: [kind[index % len(kind)] for index in range(count)] for name, kind in kinds.items()}
    return {**lists, **{name: count for name in ("num_hidden_layers", "num_layers", "n_layers") if name in fields}}
