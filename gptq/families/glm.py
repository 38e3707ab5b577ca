"""GLM-4 (glm, and glm4 of 2025 with norms after both branches), ERNIE 4.5 and Helium: Llama that turns neighbours."""

from typing import Any

from .parts import ModelParts, Options
from .reading import act_of, base_of, head_dim_of, llama_layer, model_of, norm_of, paired_columns, rotary_of, turned_by


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    turned = turned_by(rotary_of(base.rotary_emb))
    heads = config.num_attention_heads
    columns = paired_columns(heads, config.num_key_value_heads or heads, head_dim_of(config), turned)
    layers = []
    for layer in base.layers:
        changes: dict[str, Any] = {}
        if config.model_type == "glm4":
            changes["attended_norm"] = norm_of(layer.post_self_attn_layernorm)
            changes["inner_norm"] = norm_of(layer.post_mlp_layernorm)
        layers.append(llama_layer(layer, config, qkv_columns=columns, **changes))
    return model_of(hf, layers, Options(activation=act_of(base.layers[0].mlp)))


KINDS = {"glm": describe, "glm4": describe, "ernie4_5": describe, "helium": describe}
