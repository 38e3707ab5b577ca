"""GPT-2 and StarCoder 1 (gpt_bigcode): LayerNorms, learned positions, no gate; StarCoder's queries share one key."""

from typing import Any

from .parts import LayerParts, ModelParts, Options
from .reading import act_of, base_of, model_of, norm_of, refuse_if, split_by_head


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.n_head
    head_dim = config.n_embd // heads
    refuse_if(config.add_cross_attention, "cross-attention")
    refuse_if(getattr(config, "scale_attn_by_inverse_layer_idx", False), "scores scaled by the layer")
    kv_heads, columns = heads, None
    if config.model_type == "gpt_bigcode":
        kv_heads = 1 if config.multi_query else heads
        columns = None if config.multi_query else split_by_head(heads, 1, head_dim)
    layers = [
        LayerParts(
            attention_norm=norm_of(layer.ln_1),
            qkv=(layer.attn.c_attn,),
            qkv_columns=columns,
            o=layer.attn.c_proj,
            mlp_norm=norm_of(layer.ln_2),
            gate_up=(layer.mlp.c_fc,),
            down=layer.mlp.c_proj,
            rotary=-1,
        )
        for layer in base.h
    ]
    scale = None if config.scale_attn_weights else 1.0
    options = Options(norm="layer", gated=False, activation=act_of(base.h[0].mlp), score_scale=scale)
    return model_of(
        hf, layers, options, norm=norm_of(base.ln_f), heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotaries=(),
        positions=base.wpe.weight,
    )  # fmt: skip


KINDS = {"gpt2": describe, "gpt_bigcode": describe}
