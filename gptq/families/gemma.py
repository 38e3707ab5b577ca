"""Gemma 1, 2 and 3: RMSNorm of 1 + weight, scaled embeddings, GELU; from 2 on norms after both branches, caps, windows."""

from functools import partial
from typing import Any

import torch

from .parts import LayerParts, ModelParts, Options, Rotary
from .reading import act_of, base_of, llama_layer, model_of, norm_of, refuse_if, rotary_of

_norm = partial(norm_of, plus_one=True)


def _gemma(hf: Any) -> ModelParts:
    layers = [llama_layer(layer, hf.config, _norm) for layer in base_of(hf).layers]
    return _model(hf, layers, capped=False)


def _gemma2(hf: Any) -> ModelParts:
    return _model(hf, [_layer(layer, hf.config) for layer in base_of(hf).layers])


def _gemma3(hf: Any) -> ModelParts:
    base = base_of(hf)
    refuse_if(getattr(hf.config, "use_bidirectional_attention", False), "attention in both directions")
    refuse_if(hf.config.attn_logit_softcapping, "a soft cap that transformers applies in some ways of computing only")
    rotaries: tuple[Rotary, ...]
    if hasattr(base, "rotary_emb_local"):  # transformers 4
        rotaries = (rotary_of(base.rotary_emb), rotary_of(base.rotary_emb_local))
    else:
        rotaries = tuple(rotary_of(base.rotary_emb, f"{each}_attention") for each in ("full", "sliding"))
    layers = [_layer(layer, hf.config, rotary=int(layer.self_attn.is_sliding)) for layer in base.layers]
    return _model(hf, layers, rotaries=rotaries)


def _layer(layer: Any, config: Any, **changes: Any) -> LayerParts:
    return llama_layer(
        layer,
        config,
        _norm,
        attended_norm=_norm(layer.post_attention_layernorm),
        mlp_norm=_norm(layer.pre_feedforward_layernorm),
        inner_norm=_norm(layer.post_feedforward_layernorm),
        **changes,
    )


def _model(hf: Any, layers: list[LayerParts], *, capped: bool = True, **changes: Any) -> ModelParts:
    """`capped`: whether the architecture knows caps; config.json of another may have them too."""
    config, first = hf.config, base_of(hf).layers[0]
    options = Options(
        activation=act_of(first.mlp),
        qk_norm="head" if layers[0].q_norm is not None else "",
        score_scale=first.self_attn.scaling,
        score_cap=(config.attn_logit_softcapping if capped else None) or 0.0,
        embedding_scale=float(torch.tensor(config.hidden_size**0.5, dtype=hf.get_input_embeddings().weight.dtype)),
        logits_cap=(config.final_logit_softcapping if capped else None) or 0.0,
    )
    return model_of(hf, layers, options, norm=_norm(base_of(hf).norm), **changes)


KINDS = {"gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3}
