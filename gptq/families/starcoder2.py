"""StarCoder 2: Llama with LayerNorms, biases, an MLP without a gate, and one window for all layers."""

from typing import Any

from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = [
        llama_layer(
            layer, config, gate_up=(layer.mlp.c_fc,), down=layer.mlp.c_proj, window=getattr(config, "sliding_window", None) or 0
        )
        for layer in base.layers
    ]
    return model_of(hf, layers, Options(norm="layer", gated=False, activation=act_of(base.layers[0].mlp)))


KINDS = {"starcoder2": describe}
