"""What does not fit together in attention, for suitability.py; in words, empty if all fits: positions, sinks, latent vectors."""

import math

from torch import nn

from .families.parts import LatentParts, LayerParts, ModelParts
from .gptq_linear import GPTQLinear
from .mlp_shapes import inputs, is_vector, outputs, reorders


def wrong_attention(parts: ModelParts) -> str:
    if any(not -1 <= layer.rotary < len(parts.rotaries) for layer in parts.layers):
        return "layers whose rotary positions are not there"
    if any(layer.tempered for layer in parts.layers) and (parts.temperature is None or not parts.temperature.is_sound):
        return "a temperature of the queries that is no number"
    if any(layer.chunk < 0 or (layer.chunk and layer.window) for layer in parts.layers):
        return "attention in chunks and a window"
    of_heads = [] if parts.alibi is None else [parts.alibi.slopes]
    of_heads += [layer.sinks for layer in parts.layers if layer.sinks is not None]
    if any(not is_vector(each, parts.heads) for each in of_heads):
        return "slopes or sinks that are not one for each head"
    if 0 < sum(layer.sinks is not None for layer in parts.layers) < len(parts.layers):
        return "sinks in some layers only"
    return ""


def uneven_latent(parts: ModelParts) -> str:
    """Of layers whose keys and values are made of a latent vector, and of what size the processor's kernels need them."""
    latents = [each.latent for each in parts.layers if each.latent is not None]
    if not latents:
        return ""
    if len({(each.rank, each.fixed, each.turned, each.value_dim, each.queries is None) for each in latents}) > 1:
        return "latent vectors of different sizes"
    if len({(float(each.norm.eps), _eps_of(each), _width_of(each)) for each in latents}) > 1:
        return "norms with different epsilons"
    first = latents[0]
    if min(first.rank, first.fixed, first.turned, first.value_dim) < 1 or first.fixed + first.turned != parts.head_dim:
        return "layers whose sizes are not those of the heads"
    if first.rank % 16 or first.value_dim % 16 or first.fixed % 4 or first.turned % 4:
        return (
            f"latent vectors of {first.rank}, values of {first.value_dim}, keys of {first.fixed} and {first.turned} dimensions "
            "(the kernels need multiples of 16, 16, 4 and 4)"
        )
    if parts.rotary_dim not in (0, first.turned) or parts.options.qk_norm or parts.alibi is not None:
        return "latent vectors with other positions or norms of the heads"
    return next((found for each in parts.layers if (found := _uneven(each, parts.heads))), "")


def _eps_of(latent: LatentParts) -> float:
    return 0.0 if latent.queries_norm is None else float(latent.queries_norm.eps)


def _width_of(latent: LatentParts) -> int:
    return 0 if latent.queries_norm is None else int(latent.queries_norm.weight.numel())


def _uneven(layer: LayerParts, heads: int) -> str:
    latent = layer.latent
    assert latent is not None
    q = heads * (latent.fixed + latent.turned)
    said = "layers whose sizes are not those of the heads"
    if len(layer.qkv) != 2 or outputs(layer.qkv[1]) != latent.rank + latent.turned:
        return said
    if (latent.queries is None) != (latent.queries_norm is None):
        return said
    of_queries = layer.qkv[0] if latent.queries is None else latent.queries
    if outputs(of_queries) != q or inputs(layer.o) != heads * latent.value_dim:
        return said
    width = _width_of(latent)
    if latent.queries is not None and (outputs(layer.qkv[0]) != width or inputs(latent.queries) != width):
        return said
    if (inputs(latent.keys_values), outputs(latent.keys_values)) != (latent.rank, heads * (latent.fixed + latent.value_dim)):
        return said
    if latent.queries_columns is not None and not reorders(latent.queries_columns, [q]):
        return "an order of queries, keys and values that is not one of their outputs"
    if latent.keys_values.bias is not None:
        return "keys and values of a latent vector with a bias"
    if not all(isinstance(each, (GPTQLinear, nn.Linear)) for each in (of_queries, latent.keys_values)):
        return "a layer that is neither packed nor a plain linear one"
    for norm, size in ((latent.norm, latent.rank), (latent.queries_norm, width)):
        if norm is not None and (not is_vector(norm.weight, size) or norm.bias is not None or not 0 <= float(norm.eps) < 1):
            return "norms that are not as wide as the latent vector"
        if norm is not None and math.isnan(float(norm.eps)):
            return "norms without an epsilon"
    return ""
