"""Cohere's Command R (1) and Command R7B (2): side by side on one LayerNorm, neighbouring dimensions turned, scaled logits."""

from typing import Any

from .parts import ModelParts, Options
from .reading import (
    act_of,
    base_of,
    head_dim_of,
    in_halves_norm,
    llama_layer,
    model_of,
    norm_of,
    paired_columns,
    rotary_of,
    turned_by,
)


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    rotary = rotary_of(base.rotary_emb, doubled=True)
    turned = turned_by(rotary)
    columns = paired_columns(config.num_attention_heads, config.num_key_value_heads, head_dim_of(config), turned)
    layers = []
    for layer in base.layers:
        norm, attention = norm_of(layer.input_layernorm), layer.self_attn
        window = getattr(attention, "sliding_window", None)
        changes: dict[str, Any] = {}
        if getattr(attention, "q_norm", None) is not None:
            changes["q_norm"] = in_halves_norm(norm_of(attention.q_norm), turned)
            changes["k_norm"] = in_halves_norm(norm_of(attention.k_norm), turned)
        rotary_at = -1 if config.model_type == "cohere2" and window is None else 0
        layers.append(llama_layer(layer, config, mlp_norm=norm, qkv_columns=columns, rotary=rotary_at, **changes))
    options = Options(
        norm="layer",
        parallel=True,
        activation=act_of(base.layers[0].mlp),
        qk_norm="head" if layers[0].q_norm is not None else "",
        logits_scale=float(config.logit_scale),
    )
    return model_of(hf, layers, options, rotaries=(rotary,))


KINDS = {"cohere": describe, "cohere2": describe}
