"""Falcon: side by side on one or two LayerNorms (7B, 40B, 180B), or one after the other (RW); rotary positions or ALiBi."""

from typing import Any

from .alibi import slopes_of
from .parts import Alibi, LayerParts, ModelParts, Options
from .reading import act_of, base_of, model_of, norm_of, split_by_head


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    new = bool(config.new_decoder_architecture)
    kv_heads = config.num_kv_heads if new else 1 if config.multi_query else heads
    columns = split_by_head(kv_heads, heads // kv_heads, head_dim)
    parallel = new or bool(config.parallel_attn)
    two = bool(config.parallel_attn) and config.num_ln_in_parallel_attn == 2
    layers = []
    for layer in base.h:
        if two and new:
            norms = layer.ln_attn, layer.ln_mlp
        else:
            norms = layer.input_layernorm, layer.input_layernorm if config.parallel_attn else layer.post_attention_layernorm
        layers.append(
            LayerParts(
                attention_norm=norm_of(norms[0]),
                qkv=(layer.self_attention.query_key_value,),
                qkv_columns=columns,
                o=layer.self_attention.dense,
                mlp_norm=norm_of(norms[1]),
                gate_up=(layer.mlp.dense_h_to_4h,),
                down=layer.mlp.dense_4h_to_h,
                rotary=-1 if config.alibi else 0,
            )
        )
    options = Options(norm="layer", gated=False, parallel=parallel, activation=act_of(base.h[0].mlp))
    given = {"rotaries": (), "alibi": Alibi(slopes_of(heads).to(hf.device), rounded=True)} if config.alibi else {}
    return model_of(hf, layers, options, norm=norm_of(base.ln_f), kv_heads=kv_heads, head_dim=head_dim, **given)


KINDS = {"falcon": describe}
