"""IBM's Granite 3: Llama with scales of the embeddings, the scores, what layers add, and the logits. HyperCLOVA X: the same, and
perhaps norms of what the branches give."""

from typing import Any

from .parts import LayerParts, ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of, norm_of


def describe(hf: Any) -> ModelParts:
    layers = [llama_layer(layer, hf.config) for layer in base_of(hf).layers]
    return _model(hf, layers, 1 / float(hf.config.logits_scaling))


def _hyperclovax(hf: Any) -> ModelParts:
    layers = []
    for layer in base_of(hf).layers:
        after: dict[str, Any] = {}
        if hf.config.use_post_norm:
            after = {"attended_norm": norm_of(layer.post_norm1), "inner_norm": norm_of(layer.post_norm2)}
        layers.append(llama_layer(layer, hf.config, **after))
    return _model(hf, layers, float(hf.config.logits_scaling))


def _model(hf: Any, layers: list[LayerParts], logits_scale: float) -> ModelParts:
    config, base = hf.config, base_of(hf)
    options = Options(
        activation=act_of(base.layers[0].mlp),
        score_scale=float(config.attention_multiplier),
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logits_scale=logits_scale,
    )
    return model_of(hf, layers, options)


KINDS = {"granite": describe, "hyperclovax": _hyperclovax}
