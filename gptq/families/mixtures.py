"""Mixtures of experts with Llama's attention: Mixtral, Qwen 2 and 3 MoE (and the language model of Qwen3-VL's), OLMoE, FlexOlmo,
GraniteMoE, Hunyuan, ERNIE 4.5, and those whose router is a sigmoid with a correction of the choice: dots.llm1, GLM-4.5, Solar
Open, MiniMax-M2."""

from dataclasses import replace
from typing import Any

import transformers
from torch import nn

from ..experts import PackedExperts
from ..gptq_linear import GPTQLinear
from .parts import Expert, ExpertParts, LayerParts, ModelParts, Options
from .reading import (
    act_of,
    activation_of,
    base_of,
    gate_up_of,
    head_dim_of,
    llama_layer,
    model_of,
    norm_of,
    paired_columns,
    refuse_if,
    rotary_of,
    turned_and_window,
    turned_by,
)

_OLDER = transformers.__version__.startswith("4.")  # experts are a list of MLPs
_SMALLEST_SUM = 1e-9  # scores are a softmax: the sum of the chosen is above it
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def experts_of(experts: Any, *, plain: bool = True) -> tuple[Expert, ...]:
    """Of PackedExperts, or of a list of MLPs. `plain`: act(gate) * up, and nothing else."""
    if isinstance(experts, PackedExperts):
        refuse_if(plain and not experts.plain, "experts with a gate of their own")
        roles = [experts.roles(at) for at in range(experts.num_experts)]
    else:
        refuse_if(not isinstance(experts, nn.ModuleList), "experts that are not packed")
        roles = [{_ROLES[name]: each for name, each in one.named_children() if name in _ROLES} for one in experts]
    return tuple(Expert((each["gate"], each["up"]), each["down"]) for each in roles)


def router_of(router: Any) -> nn.Module:
    """A router as a linear layer."""
    if isinstance(router, (nn.Linear, GPTQLinear)):
        return router
    for name in ("layer", "wg"):  # GraniteMoE in transformers 4, Hunyuan
        if isinstance(linear := getattr(router, name, None), nn.Linear):
            return linear
    experts, hidden = router.weight.shape
    bias = getattr(router, "bias", None)
    linear = nn.Linear(hidden, experts, bias is not None, device="meta")
    linear.weight = router.weight
    if bias is not None:
        linear.bias = bias
    return linear


def softmax_experts(block: Any, router: Any, *, normed: bool) -> ExpertParts:
    """The experts of a block whose router has a softmax."""
    choices = getattr(router, "top_k", None) or block.top_k
    return ExpertParts(
        router=router_of(router),
        experts=experts_of(block.experts),
        choices=choices,
        normed=normed,
        shared_gate=getattr(block, "shared_expert_gate", None),
    )


def sigmoid_experts(block: Any) -> ExpertParts:
    """The experts of a block whose router has a sigmoid, and numbers that correct the choice.

    The modules are asked, not config.json: a setting may stand there that the architecture does not know (MiniMax's
    `norm_topk_prob`), and no module reads it.
    """
    router = block.gate

    def asked(name: str, default: Any) -> Any:
        return getattr(router, name, getattr(block, name, default))

    groups = asked("num_group", asked("n_group", 1)) or 1  # its name in transformers 5, and in 4
    return ExpertParts(
        router=router_of(router),
        experts=experts_of(block.experts),
        choices=int(asked("top_k", None)),
        sigmoid=True,
        choice_bias=asked("e_score_correction_bias", None).detach().float().reshape(-1),
        normed=asked("norm_topk_prob", True),
        scale=float(asked("routed_scaling_factor", asked("router_scaling_factor", 1.0))),  # the second in Hunyuan's V3
        groups=groups,
        chosen_groups=int(asked("topk_group", 1)) if groups > 1 else 1,
        group_best=2 if groups > 1 else 1,
    )


def mlp_changes(mlp: Any, experts: ExpertParts | None, shared: Any = None) -> dict[str, Any]:
    """The changes of `llama_layer` that a layer with experts has, and perhaps a shared one; none for a layer with an MLP."""
    if experts is None:
        return {"gate_up": gate_up_of(mlp), "down": mlp.down_proj}
    return {
        "experts": experts,
        "gate_up": () if shared is None else gate_up_of(shared),
        "down": None if shared is None else shared.down_proj,
    }


def block_of(layer: Any) -> Any:
    """What stands in the place of a layer's MLP."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def act_of_layers(layers: Any) -> str:
    """The activation of all MLPs and experts."""
    found = set()
    for layer in layers:
        block = block_of(layer)
        experts = getattr(block, "experts", None)
        if experts is None:
            found.add(act_of(block))
        else:
            found.add(activation_of(experts.act_fn) if isinstance(experts, PackedExperts) else act_of(experts[0]))
        shared = next(
            (each for name in ("shared_expert", "shared_experts", "shared_mlp") if (each := getattr(block, name, None))), None
        )
        if shared is not None:
            found.add(act_of(shared))
    refuse_if(len(found) > 1, "several activations")
    return found.pop()


def _mixtral(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        block = block_of(layer)
        changes = mlp_changes(block, softmax_experts(block, block.gate, normed=True))
        layers.append(llama_layer(layer, config, window=config.sliding_window or 0, **changes))
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers)))


def _qwen(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    refuse_if(_OLDER and config.model_type == "qwen2_moe" and config.use_sliding_window, "windows of some layers")
    layers = [_qwen_layer(layer, config) for layer in base.layers]
    qk_norm = "head" if layers[0].q_norm is not None else ""
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers), qk_norm=qk_norm))


def _qwen_layer(layer: Any, config: Any) -> LayerParts:
    block = layer.mlp
    normed = config.model_type == "qwen3_vl_moe_text" or config.norm_topk_prob
    experts = softmax_experts(block, block.gate, normed=normed) if hasattr(block, "experts") else None
    return llama_layer(layer, config, **mlp_changes(block, experts, getattr(block, "shared_expert", None)))


def _olmoe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    refuse_if(getattr(config, "clip_qkv", None) is not None, "queries, keys and values that are clipped")
    refuse_if(getattr(config, "sliding_window", None), "windows that transformers applies in some ways of computing only")
    layers = []
    for layer in base.layers:
        changes = mlp_changes(layer.mlp, softmax_experts(layer.mlp, layer.mlp.gate, normed=config.norm_topk_prob))
        if config.model_type == "flex_olmo":  # norms of what the branches give
            changes |= {
                "attention_norm": None,
                "attended_norm": norm_of(layer.post_attention_layernorm),
                "mlp_norm": None,
                "inner_norm": norm_of(layer.post_feedforward_layernorm),
            }
        layers.append(llama_layer(layer, config, window=0, **changes))
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers), qk_norm="width"))


def _granite(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        block = layer.block_sparse_moe
        changes = mlp_changes(block, softmax_experts(block, block.router, normed=True))
        if (shared := getattr(layer, "shared_mlp", None)) is not None:
            refuse_if(activation_of(shared.activation) != act_of_layers([layer]), "several activations")
            changes |= {"gate_up": (shared.input_linear,), "down": shared.output_linear}
        layers.append(llama_layer(layer, config, **changes))
    options = Options(
        activation=act_of_layers(base.layers),
        score_scale=float(config.attention_multiplier),
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logits_scale=1 / float(config.logits_scaling),
    )
    return model_of(hf, layers, options)


def _hunyuan(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        block, attention = layer.mlp, layer.self_attn
        norms: dict[str, Any] = {"q_norm": norm_of(attention.query_layernorm), "k_norm": norm_of(attention.key_layernorm)}
        choices = block.top_k if _OLDER else block.gate.top_k
        experts = ExpertParts(router=router_of(block.gate), experts=experts_of(block.experts), choices=choices)
        layers.append(llama_layer(layer, config, **norms, **mlp_changes(block, experts, block.shared_mlp)))
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers), qk_norm="head", qk_norm_last=True))


def _ernie(hf: Any) -> ModelParts:
    """Neighbouring dimensions are turned; the choice is corrected, of scores that are a softmax."""
    config, base = hf.config, base_of(hf)
    columns = paired_columns(
        config.num_attention_heads, config.num_key_value_heads, head_dim_of(config), turned_by(rotary_of(base.rotary_emb))
    )
    layers = []
    for layer in base.layers:
        block, experts = layer.mlp, None
        if hasattr(block, "experts"):
            router = block if _OLDER else block.gate
            statics = router.moe_statics
            refuse_if(router.norm_min > _SMALLEST_SUM, "weights of experts that are divided by more than their sum")
            experts = softmax_experts(block, block.gate, normed=True)
            experts = replace(experts, choice_bias=statics.e_score_correction_bias.detach().float().reshape(-1))
        changes = mlp_changes(block, experts, getattr(block, "shared_experts", None))
        layers.append(llama_layer(layer, config, qkv_columns=columns, **changes))
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers)))


def _sigmoid(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        block = block_of(layer)
        experts = sigmoid_experts(block) if hasattr(block, "experts") else None
        layers.append(llama_layer(layer, config, **mlp_changes(block, experts, getattr(block, "shared_experts", None))))
    first = layers[0].q_norm
    qk_norm = "" if first is None else "head" if first.weight.numel() == head_dim_of(config) else "width"
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers), qk_norm=qk_norm))


def _exaone(hf: Any) -> ModelParts:
    """Layers that see all tokens turn no queries and keys, where others have a window."""
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        block, attention = layer.mlp, layer.self_attn
        changes = mlp_changes(
            block, sigmoid_experts(block) if hasattr(block, "experts") else None, getattr(block, "shared_experts", None)
        )
        rotary, window = turned_and_window(attention)
        layers.append(llama_layer(layer, config, rotary=rotary, window=window, **changes))
    return model_of(hf, layers, Options(activation=act_of_layers(base.layers), qk_norm="head"))


KINDS = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "olmoe": _olmoe,
    "flex_olmo": _olmoe,
    "qwen3_vl_moe_text": _qwen,
    "hunyuan_v1_moe": _hunyuan,
    "ernie4_5_moe": _ernie,
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "dots1": _sigmoid,
    "exaone_moe": _exaone,
    "glm4_moe": _sigmoid,
    "hy_v3": _sigmoid,
    "sarvam_moe": _sigmoid,
    "solar_open": _sigmoid,
    "minimax_m2": _sigmoid,
}
