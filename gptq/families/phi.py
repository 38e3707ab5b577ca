"""Phi-1, 1.5 and 2: attention and MLP side by side on one LayerNorm, biases everywhere, a part of each head turned."""

from typing import Any

from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of, norm_of, refuse_if


def describe(hf: Any) -> ModelParts:
    base = base_of(hf)
    refuse_if(hf.config.qk_layernorm, "norms of the heads with a bias")
    layers = [
        llama_layer(
            layer,
            hf.config,
            mlp_norm=norm_of(layer.input_layernorm),
            o=layer.self_attn.dense,
            gate_up=(layer.mlp.fc1,),
            down=layer.mlp.fc2,
        )
        for layer in base.layers
    ]
    options = Options(norm="layer", parallel=True, gated=False, activation=act_of(base.layers[0].mlp))
    return model_of(hf, layers, options, norm=norm_of(base.final_layernorm))


KINDS = {"phi": describe}
