"""In what a model differs from Llama: names that a step's LIMITS give, and words in which it says what it cannot compute."""

from .parts import ModelParts, inverse_root

# What a step may be unable to compute, and in which words it says so.
OPTIONS = {
    "layer_norm": "layer norms",
    "norm_bias": "norms with a bias",
    "after": "norms of what attention and the MLP give",
    "before": "no norms before attention and the MLP",
    "parallel": "attention and MLP side by side",
    "plain_mlp": "an MLP without a gate",
    "activation": "another activation than SiLU",
    "experts": "a mixture of experts",
    "qk_norm_each": "norms of the heads, one for each",
    "qk_norm_width": "norms of queries and keys over all heads",
    "qk_norm_last": "norms of the heads after their rotation",
    "ropes": "several kinds of rotary positions, or layers without any",
    "qkv_columns": "queries, keys and values in an order of their own",
    "positions": "learned positions",
    "alibi": "ALiBi positions",
    "score_scale": "a scale of the scores",
    "score_cap": "a soft cap of the scores",
    "sinks": "attention sinks",
    "chunks": "attention in chunks",
    "temperature": "a temperature of the queries",
    "latent": "keys and values of a latent vector",
    "qk_norm_some": "norms of the heads in some layers",
    "gate_limit": "a limit of the gate",
    "embedding_scale": "a scale of the embeddings",
    "embedding_norm": "a norm of the embeddings",
    "residual_scale": "a scale of what layers add",
    "logits_scale": "a scale of the logits",
    "logits_cap": "a soft cap of the logits",
}


def options_of(parts: ModelParts) -> set[str]:
    """The names in OPTIONS of what a model has and Llama has not."""
    o, layers = parts.options, parts.layers
    each_norm = [norm for layer in layers for norm in (*layer.norms, layer.q_norm, layer.k_norm) if norm is not None]
    heads = [norm for layer in layers for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    found = {
        "layer_norm": o.norm != "rms",
        "norm_bias": any(norm.bias is not None for norm in (*each_norm, parts.norm)),
        "after": any(layer.attended_norm or layer.inner_norm for layer in layers),
        "before": any(layer.attention_norm is None or layer.mlp_norm is None for layer in layers),
        "parallel": o.parallel,
        "plain_mlp": not o.gated,
        "activation": o.activation != "silu",
        "experts": any(layer.experts is not None for layer in layers),
        "qk_norm_each": o.qk_norm == "head" and any(norm.weight.dim() > 1 for norm in heads),
        "qk_norm_width": o.qk_norm == "width",
        "qk_norm_last": o.qk_norm_last,
        "ropes": len(parts.rotaries) != 1 or any(layer.rotary != 0 for layer in layers),
        "qkv_columns": any(layer.qkv_columns is not None for layer in layers),
        "positions": parts.positions is not None,
        "alibi": parts.alibi is not None,
        "score_scale": parts.score_scale != inverse_root(parts.head_dim),
        "score_cap": bool(o.score_cap),
        "sinks": any(layer.sinks is not None for layer in layers),
        "chunks": any(layer.chunk for layer in layers),
        "temperature": any(layer.tempered for layer in layers),
        "latent": any(layer.latent is not None for layer in layers),
        "qk_norm_some": 0 < len(heads) < 2 * len(layers),
        "gate_limit": bool(o.gate_limit or o.up_offset),
        "embedding_scale": o.embedding_scale != 1,
        "embedding_norm": parts.embedding_norm is not None,
        "residual_scale": o.residual_scale != 1,
        "logits_scale": o.logits_scale != 1,
        "logits_cap": bool(o.logits_cap),
    }
    return {name for name, has in found.items() if has}
