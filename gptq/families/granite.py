"""IBM's Granite 3: Llama with scales of the embeddings, the scores, what layers add, and the logits."""

from typing import Any

from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    options = Options(
        activation=act_of(base.layers[0].mlp),
        score_scale=float(config.attention_multiplier),
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logits_scale=1 / float(config.logits_scaling),
    )
    return model_of(hf, [llama_layer(layer, config) for layer in base.layers], options)


KINDS = {"granite": describe}
