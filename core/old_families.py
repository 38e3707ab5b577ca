"""The families of 2023 whose architecture came as program code, each with what transformers calls its arithmetic now.

An entry says what is called otherwise, and what its code computes that its config.json does not say. A variant that computes
something else has a reason in `unlike`, and is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .config_numbers import shown
from .successor import Config, Successor, in_layers

_FALCON = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}


def _whole(value: Any, otherwise: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise


def _head_dim(config: Config, hidden: str = "hidden_size", heads: str = "num_attention_heads") -> int:
    return _whole(config.get(hidden)) // _whole(config.get(heads), 1)


def _has_experts(config: Config) -> str:
    return "it has experts, which its own code computes" if _whole(config.get("num_experts")) > 1 else ""


# --- InternLM ----------------------------------------------------------------------------------------


def _internlm(config: Config) -> dict[str, Any]:
    """Of InternLM 1: "rotary" says base and kind of the rotary positions."""
    rotary = config.get("rotary")
    if not isinstance(rotary, Mapping):
        return {}
    found = {"rope_theta": rotary["base"]} if "base" in rotary else {}
    if rotary.get("type") == "dynamic":
        found["rope_scaling"] = {"type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return found


def _rotary_unlike(config: Config) -> str:
    rotary = config.get("rotary")
    given = rotary if isinstance(rotary, Mapping) else {}
    known = given.get("type") in (None, "origin", "dynamic") and isinstance(given.get("scaling_factor", 1.0), (int, float))
    return "" if known else "its rotary positions (rotary in config.json) are of a kind that only its own code computes"


_INTERNLM2 = {
    **in_layers("model.layers", {
        "attention.wqkv": "self_attn.qkv_proj", "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    }),
    r"^model\.tok_embeddings\.": "model.embed_tokens.", r"^output\.": "lm_head.",
}  # fmt: skip

# --- Baichuan ----------------------------------------------------------------------------------------

_NORM_HEAD_WORDS = 125696  # of Baichuan 2, which is the vocabulary that vLLM and llama.cpp know it by


def _baichuan(config: Config) -> Successor:
    """1 and 2 say the same name, and the 13B models too, which have slopes of the scores (ALiBi) and no rotary positions."""
    second = config.get("vocab_size") == _NORM_HEAD_WORDS or "z_loss_weight" in config
    turned = _whole(config.get("max_position_embeddings"))
    kind, renamed = ("llama", {}) if turned else ("llama_alibi", {"model_max_length": "max_position_embeddings"})
    return Successor(kind, renamed, tensors={r"\.W_pack\.": ".qkv_proj."}, unit_rows=second, left=("z_loss_weight",))


# --- Orion -------------------------------------------------------------------------------------------


def _orion_unlike(config: Config) -> str:
    return "all four layers of its attention have biases" if config.get("attention_bias") else ""


# --- MiniCPM -----------------------------------------------------------------------------------------


def _minicpm(config: Config) -> dict[str, Any]:
    layers, head_dim = _whole(config.get("num_hidden_layers"), 1), _head_dim(config)
    return {
        "embedding_multiplier": config.get("scale_emb", 1),
        "residual_multiplier": config.get("scale_depth", 1) / math.sqrt(layers),
        "logits_scaling": _whole(config.get("hidden_size"), 1) / config.get("dim_model_base", 1),
        "attention_multiplier": max(1, head_dim) ** -0.5,
    }


def _minicpm_unlike(config: Config) -> str:
    if config.get("sparse_config"):
        return "it leaves parts of a long text out of its attention, which its own code computes"
    numbers = [config.get(name, 1) for name in ("scale_emb", "scale_depth", "dim_model_base")]
    if not all(isinstance(each, (int, float)) and each > 0 for each in numbers):
        return "scale_emb, scale_depth and dim_model_base in its config.json are not all positive numbers"
    return _has_experts(config)


# --- Phi 1 and 2 -------------------------------------------------------------------------------------


def _phi(config: Config) -> dict[str, Any]:
    hidden, head_dim = _whole(config.get("n_embd")), max(1, _head_dim(config, "n_embd", "n_head"))
    return {
        "intermediate_size": _whole(config.get("n_inner"), 4 * hidden),
        "num_key_value_heads": _whole(config.get("n_head_kv"), _whole(config.get("n_head"))),
        "partial_rotary_factor": min(_whole(config.get("rotary_dim"), 32), head_dim) / head_dim,
    }


_PHI = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_positions":
    "max_position_embeddings", "activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps",
    "attn_pdrop": "attention_dropout",
}  # fmt: skip
_PHI_LAYER = {
    "ln": "input_layernorm", "mixer.Wqkv": "self_attn.qkv_proj", "mixer.out_proj": "self_attn.dense", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_PHI_FIXED = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": False}
_PHI_LEFT = ("n_inner", "n_head_kv", "rotary_dim", "architecture")


def _mixformer(config: Config) -> Successor:
    """Phi 1.5 in its first weeks: the embedding is layer 0, the output layer the last."""
    count = min(_whole(config.get("n_layer")), 1000)
    tensors = {r"^layers\.0\.wte\.": "model.embed_tokens."}
    for at in range(count):
        tensors |= in_layers("layers", _PHI_LAYER, str(at + 1), str(at))
    tensors |= {rf"^layers\.{count + 1}\.ln\.": "model.final_layernorm.", rf"^layers\.{count + 1}\.linear\.": "lm_head."}
    return Successor("phi", _PHI, _PHI_FIXED, tensors, _phi, left=_PHI_LEFT)


# --- DeciLM ------------------------------------------------------------------------------------------


def _key_heads(config: Config) -> list[int]:
    given = config.get("num_key_value_heads_per_layer")
    return [_whole(each) for each in given] if isinstance(given, list) else []


def _deci(config: Config) -> dict[str, Any]:
    return {"num_key_value_heads": max(_key_heads(config), default=0)}


def _deci_unlike(config: Config) -> str:
    heads = _key_heads(config)
    if not heads or not all(heads) or any(max(heads) % each for each in heads):
        return "num_key_value_heads_per_layer in its config.json is no list of numbers that divide the largest of them"
    return ""


# --- Qwen 1 and ChatGLM ------------------------------------------------------------------------------


def _of_qwen(config: Config) -> dict[str, Any]:
    """Qwen 1: its inner size counts gate and up. Beyond `seq_length` it turns positions and scales queries in its own way."""
    now: dict[str, Any] = {"num_key_value_heads": config.get("num_attention_heads")}
    if isinstance(inner := config.get("intermediate_size"), int):
        now["intermediate_size"] = inner // 2
    if (trained := _trained(config)) is not None:
        now["max_position_embeddings"] = trained
    return now


def _trained(config: Config) -> int | None:
    lengths = [config.get(name) for name in ("seq_length", "max_position_embeddings")]
    return min((each for each in lengths if isinstance(each, int)), default=None)


def _limit_of_qwen(config: Config) -> str:
    longest, trained = config.get("max_position_embeddings"), _trained(config)
    if not isinstance(longest, int) or trained is None or longest <= trained:
        return ""
    return (
        f"Its context ends at {trained} tokens: what this architecture computes beyond them, up to {longest} (use_dynamic_ntk, "
        "use_logn_attn), is not computed here."
    )


def _of_chatglm(config: Config) -> dict[str, Any]:
    """ChatGLM 2 and 3, GLM-4 of 2024: half of each head is turned, neighbour by neighbour."""
    shares = config.get("multi_query_attention", False)
    now: dict[str, Any] = {
        "num_key_value_heads": config.get("multi_query_group_num" if shares else "num_attention_heads"),
        "partial_rotary_factor": 0.5,
    }
    if isinstance(ratio := config.get("rope_ratio", 1), (int, float)):
        now["rope_theta"] = 10000.0 * ratio
    if (rows := config.get("padded_vocab_size")) is not None:
        now["vocab_size"] = rows
    return now


_CHATGLM_NEEDS = {  # settings that its forward branches on, and what GLM computes; where they are not given, it is that
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "add_bias_linear": False,
    "pre_seq_len": None, "vision_config": None,
}  # fmt: skip


def _not_glm(config: Config) -> str:
    if "ffn_hidden_size" not in config:
        return "the first ChatGLM reads its prompt in both directions"
    for name, wanted in _CHATGLM_NEEDS.items():
        if (found := config.get(name, wanted)) != wanted:
            return f"it has the setting {name}, {shown(found)}, with which another forward is computed"
    if config.get("rope_ratio", 1) != 1 and "chatglm2" in str(config.get("_name_or_path")).lower():
        return "the positions of a ChatGLM 2 for long texts (rope_ratio) are not known here"
    return ""


FAMILIES: Mapping[str, Successor | Callable[[Config], Successor]] = {
    "RefinedWebModel": Successor("falcon", _FALCON),
    "RefinedWeb": Successor("falcon", _FALCON, {"new_decoder_architecture": True}),  # the 40B
    "Yi": Successor(
        "llama", tensors={r"\.ln1\.": ".input_layernorm.", r"\.ln2\.": ".post_attention_layernorm."},
        ropes=("yarn", "longrope", "llama3"),
    ),
    "stablelm_epoch": Successor("stablelm", {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}),
    "aquila": Successor("llama"),  # 1 and 2
    "xverse": Successor("llama", unlike=_has_experts),
    "skywork": Successor("llama"),
    "internlm": Successor(
        "llama", {"bias": "attention_bias"}, {"attention_bias": True}, reckon=_internlm, unlike=_rotary_unlike, left=("rotary",)
    ),
    "internlm2": Successor("llama", {"bias": "attention_bias"}, {"attention_bias": True}, _INTERNLM2, by_head=True),
    "baichuan": _baichuan,
    "orion": Successor(
        "stablelm", {"rms_norm_eps": "layer_norm_eps"}, {"partial_rotary_factor": 1.0}, unlike=_orion_unlike,
        left=("attention_bias",),
    ),
    "minicpm": Successor("granite", {}, {"tie_word_embeddings": True}, reckon=_minicpm, unlike=_minicpm_unlike),
    "phi-msft": Successor(
        "phi", _PHI, _PHI_FIXED,
        {
            **in_layers("transformer.h", _PHI_LAYER), r"^transformer\.embd\.wte\.": "model.embed_tokens.",
            r"^lm_head\.ln\.": "model.final_layernorm.", r"^lm_head\.linear\.": "lm_head.",
        },
        _phi, left=_PHI_LEFT,
    ),
    "mixformer-sequential": _mixformer,
    "deci": Successor("llama", reckon=_deci, unlike=_deci_unlike, left=("num_key_value_heads_per_layer",), repeats=True),
    "qwen": Successor(
        "qwen2",
        {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta", "kv_channels": "head_dim"},
        tensors={
            **in_layers("transformer.h", {
                "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.qkv_proj",
                "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
                "mlp.c_proj": "mlp.down_proj",
            }),
            r"^transformer\.wte\.": "model.embed_tokens.",
            r"^transformer\.ln_f\.": "model.norm.",
        },
        reckon=_of_qwen,
        remark=_limit_of_qwen,
    ),
    "chatglm": Successor(
        "glm",
        {
            "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size", "layernorm_epsilon": "rms_norm_eps",
            "kv_channels": "head_dim", "seq_length": "max_position_embeddings", "add_qkv_bias": "attention_bias",
        },
        tensors={
            **in_layers("transformer.encoder.layers", {
                "input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm",
                "self_attention.query_key_value": "self_attn.qkv_proj", "self_attention.dense": "self_attn.o_proj",
                "mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
            }),
            r"^transformer\.embedding\.word_embeddings\.": "model.embed_tokens.",
            r"^transformer\.encoder\.final_layernorm\.": "model.norm.",
            r"^transformer\.output_layer\.": "lm_head.",
        },
        reckon=_of_chatglm,
        unlike=_not_glm,
    ),
}  # fmt: skip
