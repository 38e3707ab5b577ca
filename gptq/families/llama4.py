"""Llama 4's text model: neighbouring dimensions turned in most layers, and attention in chunks there; norms of the heads without
weights; in the other layers a temperature; experts that read what the router has weighted."""

from typing import Any

import torch

from .mixtures import experts_of
from .parts import ExpertParts, ModelParts, Norm, Options, Temperature
from .reading import (
    Angles,
    act_of,
    activation_of,
    base_of,
    gate_up_of,
    head_dim_of,
    llama_layer,
    model_of,
    paired_columns,
    refuse_if,
    rotary_of,
    turned_by,
)


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    rotary = rotary_of(Angles(base.rotary_emb))
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    columns = paired_columns(heads, config.num_key_value_heads, head_dim, turned_by(rotary))
    layers, activations = [], set()
    for at, layer in enumerate(base.layers):
        attention, block = layer.self_attn, layer.feed_forward
        turned = bool(attention.use_rope)
        norm = getattr(attention, "qk_norm", None)
        of_heads = None if norm is None else Norm(torch.ones(head_dim, device=hf.device), None, norm.eps)
        changes: dict[str, Any] = {"gate_up": gate_up_of(block), "down": block.down_proj} if not layer.is_moe_layer else {}
        if layer.is_moe_layer:
            shared = block.shared_expert
            experts = ExpertParts(
                router=block.router, experts=experts_of(block.experts), choices=int(block.top_k), sigmoid=True, normed=False,
                weighs_input=True,
            )  # fmt: skip
            activations |= {activation_of(block.experts.act_fn)}
            changes = {"experts": experts, "gate_up": gate_up_of(shared), "down": shared.down_proj}
        activations.add(act_of(block.shared_expert if layer.is_moe_layer else block))
        layers.append(
            llama_layer(
                layer, config, qkv_columns=columns, q_norm=of_heads, k_norm=of_heads, rotary=0 if turned else -1,
                chunk=int(config.attention_chunk_size) if config.layer_types[at] == "chunked_attention" else 0,
                tempered=bool(attention.attn_temperature_tuning) and not turned, **changes,
            )
        )  # fmt: skip
    refuse_if(len(activations) != 1, "several activations")
    some = base.layers[0].self_attn
    some_norm = any(each.q_norm is not None for each in layers)
    return model_of(
        hf, layers, Options(activation=activations.pop(), qk_norm="head" if some_norm else "", qk_norm_last=some_norm),
        rotaries=(rotary,), temperature=Temperature(float(some.attn_scale), float(some.floor_scale), 1),
    )  # fmt: skip


KINDS = {"llama4_text": describe}
