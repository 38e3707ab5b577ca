"""A tiny random model of any causal architecture that the installed transformers knows."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
    "roberta-prelayernorm", "rembert", "xlm-roberta", "xlm-roberta-xl", "xlm", "xmod", "roformer", "qdqbert", "roc_bert",
    "xlnet", "reformer", "musicgen", "musicgen_melody", "git", "blt", "prophetnet", "bart", "mbart", "pegasus", "marian", "mvp",
    "plbart", "blenderbot", "blenderbot-small", "bigbird_pegasus", "trocr", "speech_to_text_2", "whisper", "emu3", "mllama",
    "phi4_multimodal", "dory", "gemma4_assistant", "gemma4_unified_assistant",
}  # fmt: skip
KINDS = tuple(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in _ENCODERS)

# Every name that configs use for a size; a config takes those that it knows.
_SIZES = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "n_embd": 64, "n_layer": 4, "n_head": 4,
    "n_inner": 128, "n_positions": 256, "d_model": 64, "n_layers": 4, "n_heads": 4, "num_layers": 4, "num_heads": 4,
    "ffn_dim": 128, "word_embed_proj_dim": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "sliding_window": 8,
    "attention_chunk_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "mamba_d_state": 16, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_ssm": 128, "state_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32,
    "moe_num_experts": 4, "moe_k": 2, "rotary_dim": 8, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 288,
    "num_kv_shared_layers": 0, "lru_width": 64, "attention_window_size": 16, "n_shared_experts": 1, "n_mamba_heads": 4,
    "mamba_headdim": 32, "mamba_ngroups": 1, "laurel_rank": 8, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip

# What the names above do not give: sizes that must fit each other, layers of a kind at places of their own.
_OWN = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2,
                      "zero_expert_num": 2},
    "mamba": {"time_step_rank": 16},
    "falcon_mamba": {"time_step_rank": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "mimo_v2_flash": {"head_dim": 48},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64}},
    "inkling_text": {"unpadded_vocab_size": 288},
    "inkling2_text": {"unpadded_vocab_size": 288},
    "inkling2_loop_text": {"unpadded_vocab_size": 288},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "xlstm": {"qk_dim_factor": 1.0},
    "ctrl": {"dff": 256},
    "nemotron_h": {"mamba_num_heads": 8, "moe_shared_expert_intermediate_size": 64},
    "minimax_m3_vl_text": {"dense_intermediate_size": 96, "shared_intermediate_size": 64},
    "kimi_linear": {"linear_num_heads": 4},
    "dots3_note": {"per_layer_config": {at: {
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 64} for at in (1, 3)}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
}  # fmt: skip
_OWN["qwen4_exp"] = _OWN["qwen4_exp_text"]  # its language model
_OWN["dots3_note_text"] = _OWN["dots3_note"]


# Sizes that kernels for GPUs take, in the place of those above: rows of 256, heads of 64, and all else in multiples of 32.
_WIDE = {
    "hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "n_embd": 256, "n_inner": 512, "d_model": 256, "ffn_dim": 512,
    "word_embed_proj_dim": 256, "moe_intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "mamba_d_head": 128, "mamba_d_ssm": 512, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "shared_expert_intermediate_size": 128, "rotary_dim": 32, "hidden_size_per_layer_input": 64,
    "lru_width": 256, "mamba_headdim": 128, "laurel_rank": 32, "index_head_dim": 64,
}  # fmt: skip
_WIDE_OWN = {
    "longcat_flash": {"head_dim": 32, "num_layers": 2, "ffn_hidden_size": 384, "expert_ffn_hidden_size": 128, "moe_topk": 2,
                      "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 128, "n_groups": 1, "expand": 2},
    "mimo_v2_flash": {"head_dim": 96},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 256, "hidden_size": 256}},
    "gemma4_text": {"global_head_dim": 128},
    "gemma4_unified_text": {"global_head_dim": 128},
    "qwen4_exp_text": _OWN["qwen4_exp"] | {"indexer_head_dim": 64},
    "qwen4_exp": _OWN["qwen4_exp"] | {"indexer_head_dim": 64},
}  # fmt: skip


def _has(config, name):
    try:
        return hasattr(config, name)
    except RuntimeError:  # it has one for each layer
        return True


def tiny_config(kind, wide=False, **changes):
    """Four layers, one of each type that the architecture has. `wide`: of the sizes that kernels take. `changes` come on top."""
    base = AutoConfig.for_model(kind)
    known = base.get_text_config() if hasattr(base, "get_text_config") else base
    usual, own = (_SIZES | _WIDE, _OWN | _WIDE_OWN) if wide else (_SIZES, _OWN)
    sizes = {name: size for name, size in usual.items() if _has(known, name)}
    if getattr(known, "sliding_window", 0) is None:
        sizes.pop("sliding_window", None)
    if hasattr(known, "qk_rope_head_dim"):  # MLA: a key for each head
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    types = list(dict.fromkeys(getattr(known, "layer_types", None) or ()))
    if types:
        if kind.startswith("granitemoehybrid"):
            types.append("full_attention")
        sizes["layer_types"] = (types * 4)[:4]
    for name, size in list(sizes.items()):
        try:
            setattr(known, name, size)
        except Exception:  # computed from others
            del sizes[name]
    return type(known)(**{**sizes, **own.get(kind, {}), **changes})


def tiny_model(kind, seed=0, wide=False, **changes):
    """fp32, in eval mode, with weights large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, wide, **changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.05 if wide else 0.1)
    return model
