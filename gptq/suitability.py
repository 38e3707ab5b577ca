"""Whether a kernel can compute a model: what config.json claims, what the tensors are and what the kernel can do, compared here.

Every way of computing passes this file before anything is built from a model. `require_sound` is for all of them, for compiled
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
from .gptq_linear import GPTQLinear
from .llama import LayerParts, LlamaParts

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
    dense_head: bool = False  # the output layer is not packed and has no bias
    length_dependent: bool = False  # rotary angles that depend on the length of the text (rope_length.py)


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-family model, each compared with the tensors."""

    layers: int
    hidden: int  # H, width of the residual
    inner: int  # outputs of gate and of up
    heads: int
    kv_heads: int
    head_dim: int  # D
    rotary_half: int  # dimension i of a head is rotated with dimension i + rotary_half
    vocabulary: int  # V, rows of the output layer
    embedding_rows: int
    eps: float  # of every RMSNorm

    def beyond(self, limits: Limits) -> str:
        """Why kernels with these limits cannot compute a model of this shape; empty if they can."""
        if limits.head_dims and self.head_dim not in limits.head_dims:
            return f"heads of {self.head_dim} dimensions (the kernels have {', '.join(map(str, limits.head_dims))})"
        if self.head_dim < 1 or self.head_dim % limits.head_dim_step:
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


def shape_of(parts: LlamaParts, limits: Limits) -> Shape:
    """The shape of a model that kernels with these limits can compute. Raises Unsuited, with the reason, for any other."""
    linears = (*parts.linears(), parts.head)
    if not all(isinstance(each, (GPTQLinear, nn.Linear)) for each in linears):
        raise Unsuited("a layer that is neither packed nor a plain linear one")
    if any(each.device != parts.device or each.is_meta for each in _tensors(parts)):
        raise Unsuited("its tensors lie on several devices")
    if parts.length_dependent and not limits.length_dependent:
        raise Unsuited("rotary positions whose angles depend on the length of the text")
    if limits.dense_head and (not isinstance(parts.head, nn.Linear) or parts.head.bias is not None):
        raise Unsuited("a packed output layer, or one with a bias")
    numbers = {parts.embedding.dtype} | ({parts.head_weight.dtype} if isinstance(parts.head, nn.Linear) else set())
    if limits.numbers is not None and numbers != {limits.numbers}:
        raise Unsuited(f"numbers other than {_name(limits.numbers)}")
    if not parts.layers or parts.embedding.dim() != 2:
        raise Unsuited("no layers, or an embedding that is no table")
    shape = Shape(
        layers=len(parts.layers),
        hidden=parts.embedding.shape[1],
        inner=_inputs(parts.layers[0].down),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        rotary_half=parts.rotary_dim // 2,
        vocabulary=_outputs(parts.head),
        embedding_rows=parts.embedding.shape[0],
        eps=float(parts.eps),
    )
    if reason := shape.beyond(limits) or _uneven(parts, shape):
        raise Unsuited(reason)
    return shape


def _uneven(parts: LlamaParts, shape: Shape) -> str:
    """What does not fit together among the layers; empty if all do."""
    if _inputs(parts.head) != shape.hidden:
        return "an output layer that is not as wide as the embedding"
    if len({(_inputs(each.qkv[0]), _inputs(each.o), _inputs(each.down)) for each in parts.layers}) != 1:
        return "layers of different sizes"
    if found := next((found for each in parts.layers if (found := _uneven_layer(each, shape))), ""):
        return found
    first = parts.layers[0]
    if any((len(each.qkv), len(each.gate_up)) != (len(first.qkv), len(first.gate_up)) for each in parts.layers):
        return "layers that are made of different parts"
    return _wrong_norm(parts, shape)


def _uneven_layer(layer: LayerParts, shape: Shape) -> str:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = [_outputs(each) for each in layer.qkv]
    if widths not in ([q, kv, kv], [q + 2 * kv]) or any(_inputs(each) != shape.hidden for each in layer.qkv):
        return "layers whose sizes are not those of the heads"
    if _inputs(layer.o) != q:
        return "layers whose sizes are not those of the heads"
    widths = [_outputs(each) for each in layer.gate_up]
    if widths not in ([shape.inner] * 2, [2 * shape.inner]) or any(_inputs(each) != shape.hidden for each in layer.gate_up):
        return "layers whose gate and up are not as wide as the input of down"
    if _outputs(layer.o) != shape.hidden or _outputs(layer.down) != shape.hidden:
        return "layers whose outputs are not as wide as the residual"
    return ""


def _wrong_norm(parts: LlamaParts, shape: Shape) -> str:
    norms = [parts.norm, *(each for layer in parts.layers for each in (layer.input_norm, layer.post_norm))]
    if any(tuple(each.shape) != (shape.hidden,) for each in norms):
        return "norms that are not as wide as the residual"
    of_heads = [each for layer in parts.layers for each in (layer.q_norm, layer.k_norm)]
    if any(each is None for each in of_heads) != all(each is None for each in of_heads):
        return "norms of the heads in some layers only"
    if any(each is not None and tuple(each.shape) != (shape.head_dim,) for each in of_heads):
        return "norms of the heads that are not as wide as a head"
    return ""


def require_sound(model: Any) -> None:
    """Every packed layer of a model is what its own numbers say; tensors with gaps are closed up.

    Raises BadCheckpoint with a sentence. Layers that are offloaded, or whose tensors a kernel has taken, are passed over.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, GPTQLinear) and layer.qweight.numel() and not (layer.qweight.is_meta or layer.g_idx.is_meta):
            if found := next(_unsound(layer), ""):
                raise BadCheckpoint(f"The packed layer {name} {found}. Nothing was computed; download the model again.")
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                tensor = getattr(layer, part)
                if not tensor.is_contiguous():
                    tensor.data = tensor.data.contiguous()


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
    low, high = (int(each) for each in layer.g_idx.aminmax())
    if low < 0 or high >= groups:
        yield f"names group {high if low >= 0 else low} in its g_idx, but it has the groups 0 to {groups - 1}"


def _tensors(parts: LlamaParts) -> Iterator[Tensor]:
    yield from (parts.embedding, parts.norm)
    for layer in parts.layers:
        yield from (each for each in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm) if each is not None)
    for each in (*parts.linears(), parts.head):
        yield from each.parameters(recurse=False)


def _inputs(linear: nn.Module) -> int:
    return int(linear.in_features)  # type: ignore[arg-type]


def _outputs(linear: nn.Module) -> int:
    return int(linear.out_features)  # type: ignore[arg-type]


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def _times(shape: Any) -> str:
    return "×".join(map(str, shape)) or "nothing"
