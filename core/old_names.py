"""Settings of 2023 in today's words: models whose architecture came as program code at first, and which transformers has since
then under another name. Their code is not run.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_numbers import shown


@dataclass(frozen=True)
class Successor:
    """What transformers calls an architecture now."""

    model_type: str
    renamed: Mapping[str, str] = field(default_factory=dict)  # settings: name then -> now
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that were not written then
    # patterns in the names of tensors -> what stands there now; of each name one pattern is applied
    tensors: Mapping[str, str] = field(default_factory=dict)
    reckon: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None  # settings then -> those now that have other values
    remark: Callable[[Mapping[str, Any]], str] | None = None  # settings then -> what the user should know, "" if nothing
    unlike: Callable[[Mapping[str, Any]], str] | None = (
        None  # settings then -> why nothing of today computes the same, "" if it does
    )

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What the user should know of a model with these settings, in sentences."""
        said = self.remark(config) if self.remark is not None else ""
        return [said] if said else []


_FALCON = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}


def in_layers(before: str, names: Mapping[str, str]) -> dict[str, str]:
    """Patterns of names in decoder layers. `before`: what stands before the layer's number."""
    return {rf"^{re.escape(before)}\.(\d+)\.{re.escape(then)}\.": rf"model.layers.\1.{now}." for then, now in names.items()}


def _of_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen 1: its inner size counts gate and up. Beyond `seq_length` it turns positions and scales queries in its own way."""
    now: dict[str, Any] = {"num_key_value_heads": config.get("num_attention_heads")}
    if isinstance(inner := config.get("intermediate_size"), int):
        now["intermediate_size"] = inner // 2
    if (trained := _trained(config)) is not None:
        now["max_position_embeddings"] = trained
    return now


def _trained(config: Mapping[str, Any]) -> int | None:
    lengths = [config.get(name) for name in ("seq_length", "max_position_embeddings")]
    return min((each for each in lengths if isinstance(each, int)), default=None)


def _limit_of_qwen(config: Mapping[str, Any]) -> str:
    longest, trained = config.get("max_position_embeddings"), _trained(config)
    if not isinstance(longest, int) or trained is None or longest <= trained:
        return ""
    return (
        f"Its context ends at {trained} tokens: what this architecture computes beyond them, up to {longest} (use_dynamic_ntk, "
        "use_logn_attn), is not computed here."
    )


def _of_chatglm(config: Mapping[str, Any]) -> dict[str, Any]:
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


def _not_glm(config: Mapping[str, Any]) -> str:
    if "ffn_hidden_size" not in config:
        return "the first ChatGLM reads its prompt in both directions"
    for name, wanted in _CHATGLM_NEEDS.items():
        if (found := config.get(name, wanted)) != wanted:
            return f"it has the setting {name}, {shown(found)}, with which another forward is computed"
    if config.get("rope_ratio", 1) != 1 and "chatglm2" in str(config.get("_name_or_path")).lower():
        return "the positions of a ChatGLM 2 for long texts (rope_ratio) are not known here"
    return ""


_OLD: Mapping[str, Successor] = {
    "RefinedWebModel": Successor("falcon", _FALCON),
    "RefinedWeb": Successor("falcon", _FALCON, {"new_decoder_architecture": True}),  # the 40B
    "Yi": Successor("llama", tensors={r"\.ln1\.": ".input_layernorm.", r"\.ln2\.": ".post_attention_layernorm."}),
    "stablelm_epoch": Successor("stablelm", {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}),
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


def successor_of(config: Mapping[str, Any]) -> Successor | None:
    """The architecture that a config.json with a name of 2023 is of now; None for a name that is no such one."""
    kind = config.get("model_type")
    return _OLD.get(kind) if isinstance(kind, str) else None


def why_unlike(config: Mapping[str, Any], to: Successor) -> str:
    """Why a model computes something that its successor does not: the end of a sentence; "" where both are the same."""
    return to.unlike(config) if to.unlike is not None else ""


def renewed(config: Mapping[str, Any], to: Successor) -> dict[str, Any]:
    """The settings in today's words, without model_type and without what points to program code."""
    left = {"model_type", "auto_map", "architectures", "transformers_version"}
    now = {to.renamed.get(name, name): value for name, value in config.items() if name not in left}
    return {**to.fixed, **now, **(to.reckon(config) if to.reckon is not None else {})}


def in_todays_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose numbers have today's names: itself, or that of its successor, which keeps its own model_type."""
    to = successor_of(config)
    kept = {name: config[name] for name in ("model_type", "architectures") if name in config}
    return config if to is None else {**renewed(config, to), **kept}
