"""GPT-NeoX (Pythia, StableLM-alpha): LayerNorms, side by side or not, q, k and v of each head together, a part of it turned."""

from typing import Any

from .parts import LayerParts, ModelParts, Options
from .reading import act_of, base_of, model_of, norm_of, split_by_head


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.num_attention_heads
    columns = split_by_head(heads, 1, config.hidden_size // heads)
    layers = [
        LayerParts(
            attention_norm=norm_of(layer.input_layernorm),
            qkv=(layer.attention.query_key_value,),
            qkv_columns=columns,
            o=layer.attention.dense,
            mlp_norm=norm_of(layer.post_attention_layernorm),
            gate_up=(layer.mlp.dense_h_to_4h,),
            down=layer.mlp.dense_4h_to_h,
        )
        for layer in base.layers
    ]
    options = Options(
        norm="layer", gated=False, parallel=bool(config.use_parallel_residual), activation=act_of(base.layers[0].mlp)
    )
    return model_of(
        hf, layers, options, norm=norm_of(base.final_layer_norm), kv_heads=heads, head_dim=config.hidden_size // heads
    )


KINDS = {"gpt_neox": describe}
