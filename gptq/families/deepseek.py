"""DeepSeek V2 and V3 (R1) and what is made of their modules (GLM-4.7-Flash, Youtu, Sarvam, MiniCPM 3): a latent vector
(MLA), and experts in groups."""

from typing import Any

import torch
from torch import Tensor, nn

from .mixtures import act_of_layers, experts_of, mlp_changes, router_of, sigmoid_experts
from .parts import ExpertParts, LatentParts, LayerParts, ModelParts, Options
from .reading import Angles, base_of, in_halves, llama_layer, model_of, norm_of, refuse_if, rotary_of


def _ordered(heads: int, fixed: int, turned: int, paired: bool) -> Tensor | None:
    """The columns of heads whose last dimensions are turned; None: in order. `paired`: neighbours are turned together."""
    if not paired:
        return None
    at = torch.arange(heads * (fixed + turned)).view(heads, fixed + turned)
    return torch.cat([at[:, :fixed], in_halves(at[:, fixed:], turned)], 1).reshape(-1)


def _layer(layer: Any, config: Any, paired: bool, **changes: Any) -> LayerParts:
    attention = layer.self_attn
    heads, turned, fixed = config.num_attention_heads, attention.qk_rope_head_dim, attention.qk_nope_head_dim
    rank = attention.kv_lora_rank
    columns = _ordered(heads, fixed, turned, paired)
    low = getattr(attention, "q_a_proj", None)
    first: nn.Module = attention.q_proj if low is None else low
    widths = int(first.out_features), rank + turned  # type: ignore[arg-type]
    latent = LatentParts(
        queries=None if low is None else attention.q_b_proj,
        queries_norm=None if low is None else norm_of(attention.q_a_layernorm),
        queries_columns=None if low is None else columns,
        norm=norm_of(attention.kv_a_layernorm),
        keys_values=attention.kv_b_proj,
        fixed=fixed,
        turned=turned,
        value_dim=attention.v_head_dim,
    )
    qkv_columns = None
    if columns is not None:
        queries = columns if low is None else torch.arange(widths[0])
        kept = _ordered(1, rank, turned, paired)
        assert kept is not None
        qkv_columns = torch.cat([queries, widths[0] + kept])
    qkv = first, attention.kv_a_proj_with_mqa
    return llama_layer(layer, config, qkv=qkv, qkv_columns=qkv_columns, q_norm=None, k_norm=None, latent=latent, **changes)


def _model(hf: Any, layers: list[LayerParts], angles: Any = None, **options: Any) -> ModelParts:
    base, attention = base_of(hf), base_of(hf).layers[0].self_attn
    refuse_if(any(each.self_attn.scaling != attention.scaling for each in base.layers), "layers of different scales")
    made = Options(activation=act_of_layers(base.layers), score_scale=float(attention.scaling), **options)
    heads = hf.config.num_attention_heads
    rotaries = (rotary_of(base.rotary_emb if angles is None else angles),)
    return model_of(
        hf, layers, made, kv_heads=heads, head_dim=attention.qk_nope_head_dim + attention.qk_rope_head_dim, rotaries=rotaries,
    )  # fmt: skip


def _v2(hf: Any) -> ModelParts:
    base = base_of(hf)
    layers = []
    for layer in base.layers:
        block, experts = layer.mlp, None
        if hasattr(block, "experts"):
            experts = _softmax_in_groups(block)
        changes = mlp_changes(block, experts, getattr(block, "shared_experts", None))
        layers.append(_layer(layer, hf.config, True, **changes))
    return _model(hf, layers, Angles(base.rotary_emb))


def _softmax_in_groups(block: Any) -> ExpertParts:
    """The weights are scores, whatever their sum: no module reads `norm_topk_prob`."""
    router = block.gate

    def asked(name: str) -> Any:
        return getattr(router, name, getattr(block, name, None))

    method = asked("topk_method")
    refuse_if(method not in ("greedy", "group_limited_greedy"), f"experts that are chosen by {method}")
    grouped = method == "group_limited_greedy"
    return ExpertParts(
        router=router_of(router),
        experts=experts_of(block.experts),
        choices=int(asked("top_k")),
        normed=False,
        scale=float(asked("routed_scaling_factor")),
        groups=int(asked("num_group")) if grouped else 1,
        chosen_groups=int(asked("topk_group")) if grouped else 1,
    )


def _v3(hf: Any) -> ModelParts:
    config = hf.config
    layers = []
    for layer in base_of(hf).layers:
        block, experts = layer.mlp, None
        if hasattr(block, "experts"):
            experts = sigmoid_experts(block)
        changes = mlp_changes(block, experts, getattr(block, "shared_experts", None))
        layers.append(_layer(layer, config, bool(config.rope_interleave), **changes))
    return _model(hf, layers)


def _minicpm3(hf: Any) -> ModelParts:
    config = hf.config
    layers = [_layer(layer, config, False, **mlp_changes(layer.mlp, None)) for layer in base_of(hf).layers]
    return _model(
        hf, layers, embedding_scale=float(base_of(hf).embed_tokens.embed_scale),
        residual_scale=float(base_of(hf).layers[0].residual_scale), logits_scale=1 / float(config.logits_scaling),
    )  # fmt: skip


KINDS = dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "youtu", "sarvam_mla"), _v3)
KINDS |= {"deepseek_v2": _v2, "minicpm3": _minicpm3}
