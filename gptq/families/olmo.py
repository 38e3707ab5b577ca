"""OLMo 1 (LayerNorm without weights), 2 and 3 (norms only of what the branches give, and of queries and keys as a whole)."""

from typing import Any

import torch

from .parts import LayerParts, ModelParts, Norm, Options, Rotary
from .reading import act_of, base_of, llama_layer, model_of, norm_of, refuse_if, rotary_of


def _olmo(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    refuse_if(config.clip_qkv is not None, "queries, keys and values that are clipped")
    norm = Norm(torch.ones(config.hidden_size, device=hf.device), None, 1e-5)
    layers = [llama_layer(layer, config, attention_norm=norm, mlp_norm=norm) for layer in base.layers]
    return model_of(hf, layers, Options(norm="layer", activation=act_of(base.layers[0].mlp)), norm=norm)


def after_layer(layer: Any, config: Any, **changes: Any) -> LayerParts:
    """A layer whose norms are all of what its branches give (OLMo 2 and 3, EXAONE 4)."""
    return llama_layer(
        layer,
        config,
        attention_norm=None,
        attended_norm=norm_of(layer.post_attention_layernorm),
        mlp_norm=None,
        inner_norm=norm_of(layer.post_feedforward_layernorm),
        **changes,
    )


def _olmo2(hf: Any) -> ModelParts:
    base = base_of(hf)
    layers = [after_layer(layer, hf.config) for layer in base.layers]
    return model_of(hf, layers, _options(base))


def _olmo3(hf: Any) -> ModelParts:
    base, kinds = base_of(hf), ("full_attention", "sliding_attention")
    rotaries: tuple[Rotary, ...]
    if hasattr(base, "rotary_embs"):  # transformers 4
        rotaries = tuple(rotary_of(base.rotary_embs[each]) for each in kinds)
    else:
        rotaries = tuple(rotary_of(base.rotary_emb, each) for each in kinds)
    layers = [after_layer(layer, hf.config, rotary=int(layer.self_attn.sliding_window is not None)) for layer in base.layers]
    return model_of(hf, layers, _options(base), rotaries=rotaries)


def _options(base: Any) -> Options:
    return Options(qk_norm="width", activation=act_of(base.layers[0].mlp))


KINDS = {"olmo": _olmo, "olmo2": _olmo2, "olmo3": _olmo3}
