"""OPT: LayerNorms, learned positions from row 2 of their table on, ReLU."""

from typing import Any

from .parts import LayerParts, ModelParts, Options
from .reading import activation_of, base_of, model_of, norm_of, refuse_if


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf).decoder
    refuse_if(base.project_in is not None or base.project_out is not None, "embeddings of another width")
    refuse_if(not config.do_layer_norm_before or base.final_layer_norm is None, "norms of the sum of branch and residual")
    layers = [
        LayerParts(
            attention_norm=norm_of(layer.self_attn_layer_norm),
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            o=layer.self_attn.out_proj,
            mlp_norm=norm_of(layer.final_layer_norm),
            gate_up=(layer.fc1,),
            down=layer.fc2,
            rotary=-1,
        )
        for layer in base.layers
    ]
    options = Options(norm="layer", gated=False, activation=activation_of(base.layers[0].activation_fn))
    return model_of(
        hf, layers, options, norm=norm_of(base.final_layer_norm), rotaries=(), kv_heads=config.num_attention_heads,
        positions=base.embed_positions.weight[base.embed_positions.offset :],
    )  # fmt: skip


KINDS = {"opt": describe}
