"""The shapes that breadth.py measures: what is in the config.json of a known model of each architecture."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 32000, "sliding_window": None},
    "gemma2-9b": {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
                  "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 42, "vocab_size": 256000,
                  "query_pre_attn_scalar": 256, "sliding_window": 4096, "dtype": "bfloat16"},
    "gemma3-12b": {"model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 48, "vocab_size": 262208,
                   "sliding_window": 1024, "dtype": "bfloat16"},
    "falcon-7b": {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
                  "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False,
                  "new_decoder_architecture": False, "alibi": False},
    "neox-20b": {"model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
                 "num_hidden_layers": 44, "vocab_size": 50432, "rotary_pct": 0.25, "use_parallel_residual": True},
    "starcoder2-7b": {"model_type": "starcoder2", "hidden_size": 4608, "intermediate_size": 18432, "num_attention_heads": 36,
                      "num_key_value_heads": 4, "num_hidden_layers": 32, "vocab_size": 49152, "sliding_window": 4096,
                      "use_bias": True},
    "glm4-9b": {"model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32,
                "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 40, "vocab_size": 151552, "attention_bias": True,
                "pad_token_id": 0},
    "opt-6.7b": {"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_attention_heads": 32, "num_hidden_layers": 32,
                 "vocab_size": 50272, "word_embed_proj_dim": 4096},
    "mpt-7b": {"model_type": "mpt", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 50432,
               "max_seq_len": 8192},
    "phi2": {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32,
             "num_hidden_layers": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4},
    "cohere-8b": {"model_type": "cohere", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 256000, "pad_token_id": 0},
    "olmo2-7b": {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 100352},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48,
                      "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    "mixtral-8x7b": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 32000, "num_local_experts": 8,
                     "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
                         "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16,
                         "num_hidden_layers": 27, "vocab_size": 102400, "n_routed_experts": 64, "num_experts_per_tok": 6,
                         "n_shared_experts": 2, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
                         "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1, "topk_method": "greedy",
                         "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "gpt-oss-20b": {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 24, "vocab_size": 201088,
                    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "dtype": "bfloat16", "group": 64},
    "qwen2.5-vl-7b": {"model_type": "qwen2_5_vl", "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_hidden_layers": 28, "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}},
    "qwen3-next": {"model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
                   "shared_expert_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
                   "num_hidden_layers": 8, "vocab_size": 151936, "num_experts": 512, "num_experts_per_tok": 10,
                   "norm_topk_prob": True},
    "bamba-9b": {"model_type": "bamba", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "attn_layer_indices": [9, 18, 27],
                 "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
    "nemotron3-nano": {"model_type": "nemotron_h", "hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32,
                       "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 52, "vocab_size": 131072,
                       "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
                       "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
                       "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
                       "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "dtype": "bfloat16",
                       "group": 64},
}  # fmt: skip
_NARROW = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 320,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 64,
    "mamba_n_heads": 8, "mamba_d_head": 32, "attn_layer_indices": [1], "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "query_pre_attn_scalar": 32, "ffn_dim": 512, "word_embed_proj_dim": 128, "mamba_num_heads": 8,
    "mamba_head_dim": 32, "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip


def config_of(name: str, layers: int, tiny: bool) -> Any:
    from transformers import AutoConfig

    facts = dict(SHAPES[name])
    if tiny:
        facts |= {key: value for key, value in _NARROW.items() if key in facts and facts[key] is not None}
        if name == "deepseek-v2-lite":
            facts["num_key_value_heads"] = 4
        if name == "qwen3-next":
            facts["num_hidden_layers"] = 4
        if name == "nemotron3-nano":
            facts["num_hidden_layers"] = 7
    elif layers:
        facts["num_hidden_layers"] = min(layers, facts["num_hidden_layers"])
    if "attn_layer_indices" in facts:
        facts["attn_layer_indices"] = [each for each in facts["attn_layer_indices"] if each < facts["num_hidden_layers"]]
    if "hybrid_override_pattern" in facts:  # a letter for each layer
        facts["hybrid_override_pattern"] = facts["hybrid_override_pattern"][: facts.pop("num_hidden_layers")]
    for ours in ("dtype", "group"):
        facts.pop(ours, None)
    if "text_config" in facts:  # of a model that sees pictures: its text is computed
        text = facts["text_config"] = {**facts["text_config"], "max_position_embeddings": 8192}
        if tiny:
            text |= {key: value for key, value in _NARROW.items() if key in text} | {"rope_scaling": {
                "type": "mrope", "mrope_section": [4, 6, 6]}}  # fmt: skip
        elif layers:
            text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
        return AutoConfig.for_model(facts.pop("model_type"), **facts, vision_config={"depth": 1})
    return AutoConfig.for_model(facts.pop("model_type"), **facts, max_position_embeddings=8192)
