"""Whether a kernel can compute a model: what config.json claims, what the tensors are and what the kernel can do, compared here.

Every Stepper of ours passes this file before anything is built from a model. `require_sound` is for all of them, for compiled
code reads tensors by their addresses and believes their shapes. `shape_of` is for the steps that compute a whole forward: they
build only from the Shape that it returns. Where it raises Unsuited, a slower and more general way computes the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadCheckpoint
from . import bit_packing
from .attention_shapes import uneven_latent, wrong_attention
from .families.differences import OPTIONS, options_of
from .families.parts import ACTIVATIONS, LayerParts, ModelParts, Norm, Options
from .gptq_linear import GPTQLinear
from .layer_facts import ranges
from .mlp_shapes import inputs, is_vector, kind_of, outputs, reorders, uneven_experts, uneven_mlp

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Unsuited(Exception):
    """What a kernel cannot compute, as a reason; a more general way can."""


@dataclass(frozen=True)
class Limits:
    """What the kernels of one step can compute."""

    head_dims: tuple[int, ...] = ()  # widths of a head; empty: every multiple of `head_dim_step`
    head_dim_step: int = 1
    hidden_step: int = 1
    most_hidden: int = 1 << 24
    numbers: torch.dtype | None = None  # of the embedding and the output layer; None: any
    plain_head: bool = False  # the output layer has no bias; a packed one is made dense
    length_dependent: bool = False  # rotary angles that depend on the length of the text (rope_length.py)
    options: frozenset[str] = frozenset()  # names in families.differences.OPTIONS of what it computes beyond Llama's forward


@dataclass(frozen=True)
class Shape:
    """The numbers of a model, each compared with the tensors, and what its layers have."""

    layers: int
    hidden: int  # H, width of the residual
    inner: int  # outputs of gate and of up, but for experts; the most that a layer has
    heads: int
    kv_heads: int
    head_dim: int  # D
    kept_heads: int  # whose keys and values a conversation keeps: kv_heads, or 1 of a latent vector
    key_dim: int  # of such a head: D, or those of the latent vector and of the turned part of the keys
    value_dim: int
    rotary_half: int  # dimension i of a head is rotated with dimension i + rotary_half
    vocabulary: int  # V, rows of the output layer
    embedding_rows: int
    eps: float  # of every norm
    norms_before: bool  # of what attention and the MLP read
    norms_after: bool  # of what they give
    positions: int  # rows of the learned positions; 0: none
    options: Options

    def beyond(self, limits: Limits) -> str:
        """Why kernels with these limits cannot compute a model of this shape; empty if they can."""
        if limits.head_dims and self.head_dim not in limits.head_dims:
            return f"heads of {self.head_dim} dimensions (the kernels have {', '.join(map(str, limits.head_dims))})"
        if self.head_dim < 1 or self.value_dim % limits.head_dim_step:
            return f"heads of {self.head_dim} dimensions (the kernels need a multiple of {limits.head_dim_step})"
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            return f"{self.heads} heads that share the keys of {self.kv_heads} (the kernels need a whole number for each)"
        if not 0 <= 2 * self.rotary_half <= self.head_dim:
            return f"{2 * self.rotary_half} rotated dimensions in heads of {self.head_dim}"
        if self.hidden % limits.hidden_step:
            return f"a hidden size of {self.hidden} (the kernels need a multiple of {limits.hidden_step})"
        if self.hidden > limits.most_hidden:
            return f"a hidden size of {self.hidden} (a block norms {limits.most_hidden} inputs at most)"
        if self.vocabulary > self.embedding_rows:
            return f"{self.vocabulary} outputs for {self.embedding_rows} embeddings (a token could be chosen that has none)"
        if not (math.isfinite(self.eps) and 0 <= self.eps < 1):
            return f"norms with an epsilon of {self.eps}"
        return ""


def shape_of(parts: ModelParts, limits: Limits) -> Shape:
    """The shape of a model that kernels with these limits can compute. Raises Unsuited, with the reason, for any other."""
    if not parts.layers or parts.embedding.dim() != 2:
        raise Unsuited("no layers, or an embedding that is no table")
    linears = (*parts.linears(), parts.head)
    if not all(isinstance(each, (GPTQLinear, nn.Linear)) for each in linears):
        raise Unsuited("a layer that is neither packed nor a plain linear one")
    if any(each.device != parts.device or each.is_meta for each in _tensors(parts)):
        raise Unsuited("its tensors lie on several devices")
    if parts.length_dependent and not limits.length_dependent:
        raise Unsuited("rotary positions whose angles depend on the length of the text")
    if limits.plain_head and parts.head.bias is not None:
        raise Unsuited("an output layer with a bias")
    if missing := sorted(options_of(parts) - limits.options, key=list(OPTIONS).index):
        raise Unsuited(" and ".join(OPTIONS[each] for each in missing))
    latent = parts.layers[0].latent
    numbers = {parts.embedding.dtype} | ({parts.head_weight.dtype} if isinstance(parts.head, nn.Linear) else set())
    if limits.numbers is not None and numbers != {limits.numbers}:
        raise Unsuited(f"numbers other than {_name(limits.numbers)}")
    shape = Shape(
        layers=len(parts.layers),
        hidden=parts.embedding.shape[1],
        inner=max((inputs(each.down) for each in parts.layers if each.down is not None), default=0),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        kept_heads=parts.kv_heads if latent is None else 1,
        key_dim=parts.head_dim if latent is None else latent.rank + latent.turned,
        value_dim=parts.head_dim if latent is None else latent.rank,
        rotary_half=parts.rotary_dim // 2,
        vocabulary=outputs(parts.head),
        embedding_rows=parts.embedding.shape[0],
        eps=float(parts.eps),
        norms_before=parts.layers[0].attention_norm is not None,
        norms_after=parts.layers[0].attended_norm is not None,
        positions=0 if parts.positions is None else parts.positions.shape[0],
        options=parts.options,
    )
    if reason := shape.beyond(limits) or _uneven(parts, shape) or _wrong_options(parts, shape):
        raise Unsuited(reason)
    return shape


def _uneven(parts: ModelParts, shape: Shape) -> str:
    """What does not fit together among the layers; empty if all do."""
    if inputs(parts.head) != shape.hidden:
        return "an output layer that is not as wide as the embedding"
    if len({(inputs(each.qkv[0]), inputs(each.o), each.latent is None) for each in parts.layers}) != 1:
        return "layers of different sizes"
    if found := uneven_latent(parts):
        return found
    plain, mixed = ([each for each in parts.layers if (each.experts is not None) == mixture] for mixture in (False, True))
    for layers in (plain, mixed):
        if len({0 if each.down is None else inputs(each.down) for each in layers}) > 1:
            return "layers of different sizes"
    if found := next((found for each in parts.layers if (found := _uneven_layer(each, shape))), ""):
        return found
    if len({len(each.qkv) for each in parts.layers}) > 1:
        return "layers that are made of different parts"
    if any(len({len(each.gate_up) for each in layers}) > 1 for layers in (plain, mixed)):
        return "layers that are made of different parts"
    if len({kind_of(each.experts) for each in mixed if each.experts is not None}) > 1:
        return "experts of different sizes, or chosen in different ways"
    return _wrong_norm(parts, shape)


def _uneven_layer(layer: LayerParts, shape: Shape) -> str:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = [outputs(each) for each in layer.qkv]
    if any(inputs(each) != shape.hidden for each in layer.qkv):
        return "layers whose sizes are not those of the heads"
    if layer.latent is None and (widths not in ([q, kv, kv], [q + 2 * kv]) or inputs(layer.o) != q):
        return "layers whose sizes are not those of the heads"
    if layer.qkv_columns is not None and not reorders(layer.qkv_columns, widths):
        return "an order of queries, keys and values that is not one of their outputs"
    if outputs(layer.o) != shape.hidden:
        return "layers whose outputs are not as wide as the residual"
    gated, found = shape.options.gated, ""
    if layer.experts is None or layer.gate_up or layer.down is not None:
        found = uneven_mlp(layer.gate_up, layer.down, shape.hidden, gated)
    if layer.experts is None or found:
        return found
    return uneven_experts(layer.experts, bool(layer.gate_up), shape.hidden, gated)


def _wrong_norm(parts: ModelParts, shape: Shape) -> str:
    wide = [parts.norm, *(each for layer in parts.layers for each in layer.norms if each is not None)]
    wide += [] if parts.embedding_norm is None else [parts.embedding_norm]
    of_heads = [
        (each, heads) for layer in parts.layers for each, heads in ((layer.q_norm, shape.heads), (layer.k_norm, shape.kv_heads))
    ]
    there = [each for each, _heads in of_heads if each is not None]
    if any(not is_vector(each.weight, shape.hidden) or not is_vector(each.bias, shape.hidden) for each in wide):
        return "norms that are not as wide as the residual"
    if len({float(each.eps) for each in (*wide, *there) if not math.isnan(each.eps)}) > 1:
        return "norms with different epsilons"
    before, after = shape.norms_before, shape.norms_after
    if any([each is not None for each in layer.norms] != [before, after] * 2 for layer in parts.layers):
        return "norms in some layers only"
    if any((layer.q_norm is None) != (layer.k_norm is None) for layer in parts.layers) or bool(there) != bool(
        shape.options.qk_norm
    ):
        return "norms of queries or of keys only"
    if shape.options.qk_norm == "width" and len(there) != len(of_heads):
        return "norms of queries and keys in some layers only"
    if any(each.bias is not None for each in there):
        return "norms of the heads with a bias"
    if len({each.weight.dim() for each in there}) > 1:
        return "norms of the heads of different kinds"
    return next((found for each, heads in of_heads if each is not None and (found := _wrong_head_norm(each, heads, shape))), "")


def _wrong_head_norm(norm: Norm, heads: int, shape: Shape) -> str:
    if shape.options.qk_norm == "width":
        return "" if is_vector(norm.weight, heads * shape.head_dim) else "norms that are not as wide as all heads"
    fits = tuple(norm.weight.shape) in ((shape.head_dim,), (heads, shape.head_dim))
    return "" if fits else "norms of the heads that are not as wide as a head"


def _wrong_options(parts: ModelParts, shape: Shape) -> str:
    o = shape.options
    if o.norm not in ("rms", "layer") or o.activation not in ACTIVATIONS or o.qk_norm not in ("", "head", "width"):
        return "options that are not known"
    caps = (o.score_cap, o.logits_cap, o.gate_limit)
    scales = (parts.score_scale, o.embedding_scale, o.residual_scale, o.logits_scale, o.up_offset, *caps)
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in scales) or min(caps) < 0:
        return "scales or caps that are no numbers"
    if (o.gate_limit or o.up_offset) and not o.gated:
        return "a limit of the gate without a gate"
    if o.parallel and (shape.norms_after or not shape.norms_before):
        return "attention and MLP side by side with norms of what they give"
    if o.logits_scale != 1 and getattr(parts.head, "bias", None) is not None:
        return "a scale of the logits and an output layer with a bias"
    if parts.positions is not None and (
        parts.positions.dim() != 2 or parts.positions.shape[1] != shape.hidden or not shape.positions
    ):
        return "learned positions that are not as wide as the residual"
    return wrong_attention(parts)


def require_sound(model: Any) -> None:
    """Every packed layer of a model is what its own numbers say; tensors with gaps are closed up.

    Raises BadCheckpoint with a sentence. Layers that are offloaded, or whose tensors a kernel has taken, are passed over.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, GPTQLinear) and layer.qweight.numel() and not (layer.qweight.is_meta or layer.g_idx.is_meta)
    }
    for name, layer in layers.items():
        if found := next(_unsound(layer), ""):
            raise BadCheckpoint(f"The packed layer {name} {found}. Nothing was computed; download the model again.")
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensor = getattr(layer, part)
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()
    for (name, layer), (low, high) in zip(layers.items(), ranges(list(layers.values())), strict=True):
        groups = layer.scales.shape[0]
        if low < 0 or high >= groups:
            raise BadCheckpoint(
                f"The packed layer {name} names group {high if low >= 0 else low} in its g_idx, but it has the groups 0 to "
                f"{groups - 1}. Nothing was computed; download the model again."
            )


def _unsound(layer: GPTQLinear) -> Iterator[str]:
    k, n, groups = layer.in_features, layer.out_features, bit_packing.group_count(layer.in_features, layer.group_size)
    wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "qweight": ((bit_packing.packed_length(k, layer.bits), n), (torch.int32,)),
        "qzeros": ((groups, bit_packing.packed_length(n, layer.bits)), (torch.int32,)),
        "scales": ((groups, n), _FLOATS),
        "g_idx": ((k,), (torch.int32, torch.int64)),
        "bias": ((n,), _FLOATS),
    }
    if layer.qweight.dtype == layer.qzeros.dtype and layer.qweight.dtype in (torch.int8, torch.int16, torch.int64):
        layer.prepare()  # makes int32 words of them
    for part, (shape, dtypes) in wanted.items():
        tensor = getattr(layer, part)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            wanted_of = f"{k} inputs, {n} outputs and {groups} groups"
            yield f"has {part} {_times(tensor.shape)}; {_times(shape)} was expected of {wanted_of}"
        if tensor.dtype not in dtypes:
            yield f"has its {part} as {_name(tensor.dtype)}; {' or '.join(map(_name, dtypes))} was expected"
        if tensor.device != layer.qweight.device:
            yield f"has its {part} on {tensor.device} and its weights on {layer.qweight.device}"


def _tensors(parts: ModelParts) -> Iterator[Tensor]:
    yield parts.embedding
    norms = [parts.norm, parts.embedding_norm]
    for layer in parts.layers:
        norms += [*layer.norms, layer.q_norm, layer.k_norm]
        norms += [] if layer.latent is None else [layer.latent.queries_norm, layer.latent.norm]
        choice_bias = None if layer.experts is None else layer.experts.choice_bias
        yield from (each for each in (layer.sinks, choice_bias) if each is not None)
    for norm in norms:
        if norm is not None:
            yield from (each for each in (norm.weight, norm.bias) if each is not None)
    yield from (each for each in (parts.positions, None if parts.alibi is None else parts.alibi.slopes) if each is not None)
    for each in (*parts.linears(), parts.head):
        yield from each.parameters(recurse=False)


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def _times(shape: Any) -> str:
    return "×".join(map(str, shape)) or "nothing"
