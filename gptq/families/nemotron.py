"""Nemotron and Minitron: Llama with LayerNorms of 1 + weight, ReLU squared without a gate, a part of each head turned."""

from functools import partial
from typing import Any

from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of, norm_of

_norm = partial(norm_of, plus_one=True)


def describe(hf: Any) -> ModelParts:
    base = base_of(hf)
    layers = [llama_layer(layer, hf.config, _norm, gate_up=(layer.mlp.up_proj,)) for layer in base.layers]
    options = Options(norm="layer", gated=False, activation=act_of(base.layers[0].mlp))
    return model_of(hf, layers, options, norm=_norm(base.norm))


KINDS = {"nemotron": describe}
