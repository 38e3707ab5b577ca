"""SmolLM 3 and EXAONE 4, some of whose layers turn no queries and keys; Hunyuan, which norms them after they are turned."""

from typing import Any

from .olmo import after_layer
from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of, norm_of, turned_and_window


def _smollm3(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = [llama_layer(layer, config, rotary=0 if layer.self_attn.use_rope else -1) for layer in base.layers]
    return model_of(hf, layers, Options(activation=act_of(base.layers[0].mlp)))


def _exaone4(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        rotary, window = turned_and_window(layer.self_attn)
        layers.append(after_layer(layer, config, rotary=rotary, window=window))
    return model_of(hf, layers, Options(activation=act_of(base.layers[0].mlp), qk_norm="head"))


def _hunyuan(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = [
        llama_layer(
            layer,
            config,
            q_norm=norm_of(layer.self_attn.query_layernorm),
            k_norm=norm_of(layer.self_attn.key_layernorm),
        )
        for layer in base.layers
    ]
    return model_of(hf, layers, Options(activation=act_of(base.layers[0].mlp), qk_norm="head", qk_norm_last=True))


KINDS = {"smollm3": _smollm3, "exaone4": _exaone4, "hunyuan_v1_dense": _hunyuan}
