"""BLOOM, MPT and Baichuan-13B, whose positions are slopes of the scores (ALiBi); Press et al. 2021, arXiv 2108.12409."""

import math
from typing import Any

import torch
from torch import Tensor

from .parts import Alibi, LayerParts, ModelParts, Options
from .reading import act_of, activation_of, base_of, llama_layer, model_of, norm_of, refuse_if, split_by_head


def slopes_of(heads: int) -> Tensor:
    """fp32 [heads], as BLOOM and Falcon compute them: those of the power of two below, then every other one of twice it."""
    power = 2 ** math.floor(math.log2(heads))

    def series(count: int, taken: Tensor) -> Tensor:
        base = torch.tensor(2 ** (-(2 ** -(math.log2(count) - 3))), dtype=torch.float32)
        return torch.pow(base, taken)

    found = series(power, torch.arange(1, 1 + power))
    rest = min(power, heads - power)
    return torch.cat([found, series(2 * power, torch.arange(1, 1 + 2 * rest, 2))]) if rest else found


def _mpt_slopes(heads: int, alibi_bias_max: float) -> Tensor:
    """fp32 [heads], as MPT computes them: every other one of the power of two above, then the rest."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 1.0 / torch.pow(2, torch.arange(1, power + 1).float() * (alibi_bias_max / power))
    return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def _bloom(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.n_head
    head_dim = config.hidden_size // heads
    refuse_if(config.apply_residual_connection_post_layernorm, "a residual that was normed")
    columns = split_by_head(heads, 1, head_dim)
    layers = [
        LayerParts(
            attention_norm=norm_of(layer.input_layernorm),
            qkv=(layer.self_attention.query_key_value,),
            qkv_columns=columns,
            o=layer.self_attention.dense,
            mlp_norm=norm_of(layer.post_attention_layernorm),
            gate_up=(layer.mlp.dense_h_to_4h,),
            down=layer.mlp.dense_4h_to_h,
            rotary=-1,
        )
        for layer in base.h
    ]
    refuse_if(config.pretraining_tp > 1 and config.slow_but_exact, "products in pieces")
    options = Options(norm="layer", gated=False, activation=act_of(base.h[0].mlp))
    return model_of(
        hf, layers, options, norm=norm_of(base.ln_f), heads=heads, kv_heads=heads, head_dim=head_dim, rotaries=(),
        embedding_norm=norm_of(base.word_embeddings_layernorm), alibi=Alibi(slopes_of(heads).to(hf.device)),
    )  # fmt: skip


def _mpt(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.n_heads
    attention = config.attn_config
    refuse_if(attention.clip_qkv, "queries, keys and values that are clipped")
    refuse_if(
        not attention.alibi or attention.qk_ln or attention.prefix_lm or attention.attn_uses_sequence_id, "a variant of MPT"
    )
    layers = [
        LayerParts(
            attention_norm=norm_of(layer.norm_1),
            qkv=(layer.attn.Wqkv,),
            o=layer.attn.out_proj,
            mlp_norm=norm_of(layer.norm_2),
            gate_up=(layer.ffn.up_proj,),
            down=layer.ffn.down_proj,
            rotary=-1,
        )
        for layer in base.blocks
    ]
    options = Options(
        norm="layer", gated=False, activation=activation_of(base.blocks[0].ffn.act), score_scale=base.blocks[0].attn.softmax_scale
    )
    return model_of(
        hf, layers, options, norm=norm_of(base.norm_f), heads=heads, kv_heads=heads, head_dim=config.hidden_size // heads,
        rotaries=(), alibi=Alibi(_mpt_slopes(heads, 8).to(hf.device)),
    )  # fmt: skip


def _llama(hf: Any) -> ModelParts:
    """Baichuan-13B and Baichuan2-13B (sloped_llama.py)."""
    layers = [llama_layer(layer, hf.config, rotary=-1) for layer in base_of(hf).layers]
    slopes = slopes_of(hf.config.num_attention_heads).to(hf.device)
    return model_of(hf, layers, Options(activation=act_of(base_of(hf).layers[0].mlp)), rotaries=(), alibi=Alibi(slopes))


KINDS = {"bloom": _bloom, "mpt": _mpt, "llama_alibi": _llama}
