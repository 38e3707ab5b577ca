"""StableLM 2 and 3B: Llama with LayerNorms and a part of each head turned; 12B side by side, with a norm for each head."""

from typing import Any

import torch

from .parts import LayerParts, ModelParts, Norm, Options
from .reading import act_of, base_of, llama_layer, model_of, norm_of, refuse_if


def _norm_of_heads(module: Any) -> Norm:
    """One LayerNorm for each head, in a list."""
    refuse_if(any(each.bias is not None for each in module.norms), "norms of the heads with a bias")
    return Norm(torch.stack([each.weight.detach() for each in module.norms]), None, module.norms[0].eps)


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers: list[LayerParts] = []
    for layer in base.layers:
        changes: dict[str, Any] = {}
        if config.use_parallel_residual:
            changes["mlp_norm"] = norm_of(layer.input_layernorm)
        if config.qk_layernorm:
            changes["q_norm"], changes["k_norm"] = (
                _norm_of_heads(each) for each in (layer.self_attn.q_layernorm, layer.self_attn.k_layernorm)
            )
        layers.append(llama_layer(layer, config, **changes))
    options = Options(
        norm="layer",
        parallel=bool(config.use_parallel_residual),
        activation=act_of(base.layers[0].mlp),
        qk_norm="head" if config.qk_layernorm else "",
    )
    return model_of(hf, layers, options)


KINDS = {"stablelm": describe}
